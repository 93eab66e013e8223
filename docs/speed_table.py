"""The README's table of training speeds, from `docs/records/tuning-speed.json`."""

from __future__ import annotations

from pathlib import Path

from qsun.records import read_record

RECORD = Path(__file__).parent / "records" / "tuning-speed.json"
PLAIN = "plain loop, batch 32"
WITH_GRAPHS = "sun, CUDA graphs, batch 32"


def table() -> str:
    """Step time and throughput of each way to train, as ratios within the one run."""
    record = read_record(RECORD, "tuning-speed")
    medians = record.result["medians"]
    lines = [
        "| training step on math | of full fine-tuning's step | tokens/s, of the plain loop's |",
        "|---|---|---|",
    ]
    for name, found in medians.items():
        partner = name.replace("sun LoRA", "full-ft").replace("sun", "full-ft")
        ratio = "" if name == PLAIN else f"{found['step_ms'] / medians[partner]['step_ms']:.2f}"
        speed = found["tokens_per_s"] / medians[PLAIN]["tokens_per_s"]
        lines.append(f"| {name} | {ratio} | {speed:.1f} |")
    epoch = record.result["epoch"][WITH_GRAPHS]
    differences = record.result["graph_differences"]
    lines.append(
        f"\nMedians of {len(record.result['rounds'][PLAIN])} rounds over the same "
        f"{record.result['rows']} rows, whole steps, one {record.hardware['accelerator']}, by "
        "`tests/gpu/tuning_speed.py`; the plain loop is autocast with both modules padded to the "
        f"longest row. {epoch['rows']:,} rows once, graphs captured on the way: "
        f"{epoch['seconds']:.0f} s. Gradients with CUDA graphs differ from ordinary ones by "
        f"{differences['graphs']:.4f} of their norm, two ordinary passes by "
        f"{differences['ordinary']:.4f}."
    )
    return "\n".join(lines) + "\n"
