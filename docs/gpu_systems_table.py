"""The README's table of three systems on a GPU: all on a single one, then simulated with one each.

From `docs/records/gpu-serving-systems.json` and `docs/records/gpu-simulation.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.records import Record, read_record

RECORDS = Path(__file__).parent / "records"
NAMES = {"isolated": "isolated", "sun": "SUN", "qsun": "**QSUN**"}
MILLI = 1000.0


def table() -> str:
    """Each system at the least skew and the most, measured and simulated."""
    record = read_record(RECORDS / "gpu-serving-systems.json", "serving-systems")
    simulated = read_record(RECORDS / "gpu-simulation.json", "gpu-simulation")
    alphas = _ends(record.result["rows"])
    heads = [f"alpha {alpha:g}: {what}" for alpha in alphas for what in ("tokens/s", "TPOT, ms")]
    lines = [
        f"| {_users(record)} users, all workers on one GPU | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for system in record.result["systems"]:
        cells = [cell for alpha in alphas for cell in _cells(record.result, system, alpha)]
        lines.append(f"| {name_of(system)} | {' | '.join(cells)} |")
    heads = [f"alpha {alpha:g}: {what}" for alpha in alphas for what in ("a decode GPU", "TPOT")]
    lines += ["", f"| simulated, a GPU a decode worker | {' | '.join(heads)} |"]
    lines.append("|---" * (1 + len(heads)) + "|")
    rows = simulated.result["a_gpu_a_decode_worker"]
    for system in dict.fromkeys(row["system"] for row in rows):
        lines.append(f"| {name_of(system)} | {' | '.join(_shares(rows, system, alphas))} |")
    return "\n".join([*lines, "", _legend(record, simulated)]) + "\n"


def _cells(result: dict[str, Any], system: str, alpha: float) -> tuple[str, str]:
    """Tokens a second, and how many times isolated's; TPOT's p50 and p99."""
    (row,) = [one for one in result["rows"] if (one["system"], one["alpha"]) == (system, alpha)]
    told = f"{row['tokens_per_s']:,.0f}"
    for one in result["ratios"]:
        if (one["system"], one["alpha"]) == (system, alpha) and one["to"].startswith("isolated"):
            told += f" ({one['tokens_per_s']:.2f}x)"
    return told, both_percentiles(row, "tpot")


def _shares(rows: list[dict[str, Any]], system: str, alphas: list[float]) -> list[str]:
    """Tokens a second of a decode worker, and TPOT, each of isolated's."""
    found = {row["alpha"]: row["to_isolated"] for row in rows if row["system"] == system}
    return [
        cell
        for alpha in alphas
        for cell in (
            f"{found[alpha]['tokens_per_s_per_decode_worker']:.2f}x",
            f"{found[alpha]['tpot_p50_s']:.2f}",
        )
    ]


def both_percentiles(row: dict[str, Any], name: str) -> str:
    """A latency's median and 99th percentile in ms."""
    digits = 2 if name == "tpot" else 0
    return " / ".join(f"{MILLI * row[f'{name}_{which}_s']:,.{digits}f}" for which in ("p50", "p99"))


def _ends(rows: list[dict[str, Any]]) -> list[float]:
    alphas = {row["alpha"] for row in rows}
    return [min(alphas), max(alphas)]


def name_of(system: str) -> str:
    """A system as it is told, with its decode workers."""
    kind, _, decode = system.partition("-")
    return f"{NAMES[kind]}, {decode} decode worker{'s' if decode != '1' else ''}"


def _users(record: Record) -> int:
    return int(record.config["users"])


def _legend(record: Record, simulated: Record) -> str:
    result, load = record.result, record.config
    checked = simulated.result["checked"]
    tokens = [one["simulated_of_measured"]["tokens_per_s"] - 1 for one in checked]
    tpot = [abs(one["simulated_of_measured"]["tpot_s"] - 1) for one in checked]
    return (
        f"{result['shape']}'s shape, {result['weights']} weights, vLLM {result['serving']['vllm']} "
        f"and NIXL {result['serving']['nixl']} on one {record.hardware['accelerator']}; one "
        f"prefill worker with four tasks' LoRA modules, on that GPU as well, before every system; "
        f"prompts of {load['prompt_tokens']} tokens, answers of {load['output_tokens']}, "
        f"{load['seconds']:g} s a run, QSUN in asymmetric groups of 128 on the kernel that its "
        "launch spec chose. In brackets, of isolated's; TPOT is p50 / p99. By "
        "`tests/gpu/serve_systems.py`. Below, what `qsun simulate` makes of the same users by the "
        "curves of one decode worker, of isolated's, by `tests/gpu/simulate_systems.py`: of "
        f"measured systems with one decode worker it tells TPOT to {100 * max(tpot):.0f} %, and "
        f"tokens/s {100 * min(tokens):.0f} to {100 * max(tokens):.0f} % too high."
    )
