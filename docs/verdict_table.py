"""The README's table of one bundle's verdict and the served matrix, from their records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from qsun.records import read_record

RECORDS = Path(__file__).parent / "records"
MEANINGS = {
    "static": "files alone",
    "numeric": "K, V, predictions, 1,024 tokens of output",
    "served": "vLLM over NIXL, prompts of 2 to 513 tokens",
}


def table() -> str:
    """What each level took, how many checks it made, and on which bundles vLLM itself was asked."""
    record = read_record(RECORDS / "smollm2-135m-verdict.json", "verdict")
    checks = Counter(check["name"].partition(".")[0] for check in record.result["checks"])
    passed = Counter(
        check["name"].partition(".")[0]
        for check in record.result["checks"]
        if check["outcome"] == "passed"
    )
    lines = ["| level | what is compared | checks passed | seconds |", "|---|---|---|---|"]
    for level, seconds in record.result["seconds"].items():
        lines.append(
            f"| {level} | {MEANINGS[level]} | {passed[level]} of {checks[level]} | {seconds:.1f} |"
        )
    matrix = read_record(RECORDS / "served-matrix.json", "served-matrix").result["bundles"]
    whole = sum(all(check["outcome"] == "passed" for check in one["checks"]) for one in matrix)
    modules = ", ".join(dict.fromkeys(one["module"] for one in matrix))
    lines.append(
        f"\nThe bundle of `configs/smollm2-135m-bundle.yaml`, two tasks, on "
        f"{record.hardware['cores']} cores, by `make records`. The served level on more bundles, "
        f"prefill modules {modules}, each in both formats: {whole} of {len(matrix)} passed; of "
        f"qsun's engine, LoRA, {_by_bits()}, codes of less than 4 packed in 4 "
        "(`tests/served_matrix.py`)."
    )
    return "\n".join(lines) + "\n"


def _by_bits() -> str:
    """How many bundles passed with codes of each number of bits, both formats together."""
    found = read_record(RECORDS / "served-bits.json", "served-matrix").result["bundles"]
    by_bits: dict[str, list[bool]] = {}
    for one in found:
        bits = one["decode"].partition("A16")[0].removeprefix("W")
        passed = all(check["outcome"] == "passed" for check in one["checks"])
        by_bits.setdefault(bits, []).append(passed)
    return ", ".join(f"{sum(ok)} of {len(ok)} at {bits} bits" for bits, ok in by_bits.items())
