"""Write the measured tables of the README and of `docs/kernels.md` from the records' numbers.

Run `python docs/readme_table.py` after `make records`; a test fails while they disagree.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ablation_table
import bits_table
import chaos_table
import drift_table
import engines_table
import gpu_skew_table
import gpu_systems_table
import kernel_table
import overhead_table
import peers_table
import simulator_table
import speed_table
import systems_table
import tpot_table
import verdict_table

from qsun.records import read_record

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/kernels.md", "docs/benching.md")
RECORDS = ("smollm2-135m-w4.json", "smollm2-135m-w3.json")
LARGE = {"qsun": "gpu-8b-shape-w4-qsun.json", "llm-compressor's AWQ": "gpu-8b-shape-w4.json"}
HEADER = (
    "| SmolLM2-135M-Instruct | linear weights, of 16-bit | perplexity "
    "| vLLM against transformers, nats |\n|---|---|---|---|"
)
MARKED = r"(?<=<!-- table: docs/{}.py -->\n).*?(?=<!-- end of table -->)"


def rows(result: dict[str, Any], full_precision: bool) -> list[str]:
    """The table rows of one record; `full_precision` puts its base model's row first."""
    plan, quantization = result["plan"], result["quantization"]
    perplexity, check = quantization["perplexity"], result["load_check"]
    name = f"W{plan['bits']}A16, group {plan['group_size']}"
    packed = f", packed in {plan['stored_bits']} bits" if plan["stored_bits"] else ""
    full = perplexity["full_precision"]

    def loss(value: float) -> str:
        return f"{value:.2f} ({100 * (value / full - 1):+.1f} %)"

    def agreement(which: str) -> str:
        found = check.get(which)
        return f"{found['mean_difference']:.3f}" if found else "not asked"

    lines = []
    if full_precision:
        lines.append(f"| bfloat16 | 1 | {full:.2f} | {agreement('full_precision')} |")
    lines.append(f"| {name}, round-to-nearest | | {loss(perplexity['round_to_nearest'])} | |")
    lines.append(
        f"| **{name}, by qsun**{packed} | {quantization['size_ratio']:.3f} "
        f"| {loss(perplexity['quantized'])} | {agreement('quantized')} |"
    )
    return lines


def table() -> str:
    """The whole table, and the one sentence that says what made it."""
    lines = [HEADER]
    for number, name in enumerate(RECORDS):
        record = read_record(ROOT / "docs" / "records" / name, "quantization")
        lines += rows(record.result, full_precision=number == 0)
    cost, machine = record.result["cost"], record.hardware
    lines.append(
        f"\nMade by `make records` on {machine['cores']} cores ({machine['processor']}); the "
        f"{record.result['plan']['bits']}-bit run took {cost['wall_s'] / 60:.1f} minutes, "
        f"{cost['search_s']:.0f} s of them search, and "
        f"{cost['peak_memory_bytes'] / 2**30:.1f} GiB."
    )
    lines.append(f"\n{large_model()}")
    return "\n".join(lines) + "\n"


def large_model() -> str:
    """What runs on a GPU cost; their weights are random, so their perplexities say nothing."""
    told = []
    for engine, name in LARGE.items():
        record = read_record(ROOT / "docs" / "records" / name, "quantization")
        cost, calibration = record.result["cost"], record.result["calibration"]
        told.append(
            f"{engine} {cost['wall_s'] / 60:.1f} minutes, {cost['search_s']:.0f} s of them search, "
            f"{cost['peak_memory_bytes'] / 2**30:.1f} GiB of memory and "
            f"{cost['peak_accelerator_bytes'] / 2**30:.1f} GiB on the GPU"
        )
    return (
        f"Llama-3.1-8B's shape with random weights, on one {record.hardware['accelerator']}, "
        f"{calibration['samples']} samples of {calibration['tokens'] // calibration['samples']} "
        f"tokens, no load check (`tests/gpu/quantize_8b_shape.sh`): {'; '.join(told)}. Two runs on "
        "two days, qsun's beside other work on the same host: compare memory, not time."
    )


def rendered(page: str) -> str:
    """`page` with its tables replaced."""
    tables = {
        "readme_table": table(),
        "gpu_systems_table": gpu_systems_table.table(),
        "gpu_skew_table": gpu_skew_table.table(),
        "systems_table": systems_table.table(),
        "bits_table": bits_table.table(),
        "engines_table": engines_table.table(),
        "ablation_table": ablation_table.table(),
        "peers_table": peers_table.tables(),
        "simulator_table": simulator_table.table(),
        "speed_table": speed_table.table(),
        "drift_table": drift_table.table(),
        "verdict_table": verdict_table.table(),
        "overhead_table": overhead_table.table(),
        "chaos_table": chaos_table.table(),
        "kernel_table": kernel_table.table(),
        "tpot_table": tpot_table.table(),
    }
    for name, text in tables.items():
        page = re.sub(MARKED.format(name), lambda _, text=text: text, page, count=1, flags=re.S)
    return page


if __name__ == "__main__":
    for path in (ROOT / name for name in PAGES):
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
