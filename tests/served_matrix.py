"""Run the served level on several bundles and record every length's outcome.

    python -m tests.served_matrix BUNDLE... RECORD

One bundle after another: each starts its own workers. Ends with 1 where any check did not pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsun.bundle import Bundle, read_bundle
from qsun.environments import ServingEnvironment, find_serving_environment
from qsun.progress import announce
from qsun.quiet import quiet_libraries
from qsun.records import new_record
from qsun.verdict import Check, Outcome
from qsun.verify.served.judgement import ServedCheckConfig
from qsun.verify.served.level import served_checks


def main() -> int:
    """Check every bundle, write the record, print what did not pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("record", type=Path, metavar="RECORD")
    arguments = parser.parse_args()
    quiet_libraries()
    serving, settings = find_serving_environment(), ServedCheckConfig()
    found = []
    for folder in arguments.bundles:
        announce(f"matrix: {folder}")
        found.append(outcome(read_bundle(folder.absolute()), serving, settings))
    result = {"serving": serving.versions, "bundles": found}
    new_record("served-matrix", settings, 0, result).write(arguments.record)
    bad = [
        f"{one['bundle']}: {check['name']}: {check['message']}"
        for one in found
        for check in one["checks"]
        if check["outcome"] != Outcome.PASSED.value
    ]
    print("\n".join(bad or [f"all {len(found)} bundles passed"]))
    return 1 if bad else 0


def outcome(
    bundle: Bundle, serving: ServingEnvironment, settings: ServedCheckConfig
) -> dict[str, Any]:
    """What the record says of one bundle."""
    started = time.monotonic()
    checks = served_checks(bundle, serving, settings)
    return {
        "bundle": bundle.manifest.name,
        "manifest_sha256": bundle.digest,
        "decode": bundle.manifest.decode_scheme,
        "prefill": [
            {"task": module.task, "module": module.module, "system": module.system}
            for module in bundle.manifest.prefill
        ],
        "checks": [plain(check) for check in checks],
        "seconds": round(time.monotonic() - started, 1),
    }


def plain(check: Check) -> dict[str, Any]:
    """A check as plain values."""
    return asdict(check) | {"outcome": check.outcome.value}


if __name__ == "__main__":
    sys.exit(main())
