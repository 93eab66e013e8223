"""The README's table of both engines, from `docs/records/engines-*.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.records import read_record

RECORDS = tuple(Path(__file__).parent / "records" / f"engines-{n}.json" for n in (32, 512))
ANSWERS = tuple(
    Path(__file__).parent / "records" / f"engines-answers{of}.json" for of in ("", "-tools")
)
CALIBRATION = "`calib/math-tools-served.yaml`"
LABELS = {"llmcompressor": "AWQ by llm-compressor", "qsun": "engine qsun"}


def table() -> str:
    """Loss where the decoder serves, plain perplexity and cost, by bits and engine."""
    records = [read_record(path, "engine-comparison") for path in RECORDS]
    result = records[0].result
    tasks = list(next(iter(result["bits"].values()))["decode_positions"])
    columns = [*(f"{task}, loss" for task in tasks), "perplexity", "search", "memory"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    first = next(iter(result["bits"].values()))
    losses = [f"{first['decode_positions'][task]['full_precision']:.3f}" for task in tasks]
    full = first["qsun"]["perplexity"]["full_precision"]
    lines.append(f"| bfloat16 | {' | '.join(losses)} | {full:.2f} | | |")
    for record in records:
        for bits, found in record.result["bits"].items():
            what = f"{bits.removeprefix('w')} bits, {record.result['samples']} samples"
            lines += [_row(what, engine, found, tasks) for engine in LABELS]
    machines = " and ".join(dict.fromkeys(_machine(record.hardware) for record in records))
    lines.append(
        f"\nNats a response token behind each task's prefill module ({result['rows']} validation "
        f"rows a task at most); in brackets by how much engine qsun's is lower, with a 95 % paired "
        f"interval. Samples of {CALIBRATION}; {machines}, both engines of a row in one run, each a "
        f"process of its own, by `tests/compare_engines.py`. {_answers()}"
    )
    return "\n".join(lines) + "\n"


def _machine(hardware: dict[str, Any]) -> str:
    return f"{hardware['cores']} cores ({hardware['processor']})"


def _row(what: str, engine: str, found: dict[str, Any], tasks: list[str]) -> str:
    cells = [_loss(found["decode_positions"][task], engine) for task in tasks]
    cells.append(f"{found[engine]['perplexity']['quantized']:.2f}")
    cost, theirs = found[engine]["cost"], found["llmcompressor"]["cost"]
    ratio = theirs["search_s"] / cost["search_s"]
    cells.append(f"{cost['search_s']:.0f} s" + (f" ({ratio:.1f}x)" if engine == "qsun" else ""))
    cells.append(f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB")
    label = f"{what}, {LABELS[engine]}"
    return f"| {f'**{label}**' if engine == 'qsun' else label} | {' | '.join(cells)} |"


def _loss(positions: dict[str, Any], engine: str) -> str:
    if engine != "qsun":
        return f"{positions[engine]:.3f}"
    least, most = positions["interval"]
    lower = f"{positions['qsun_lower_by']:.3f} ({least:.3f} to {most:.3f})"
    return f"{positions['qsun']:.3f} [{lower}]"


def _answers() -> str:
    """Right answers behind the prefill module, of decode modules made as in the table."""
    results = [read_record(path, "engine-comparison").result for path in ANSWERS]
    told = []
    for result in results:
        for bits, found in result["bits"].items():
            for test, right in found["answers"].items():
                least, most = (100 * one for one in right["interval"])
                told.append(
                    f"{bits.removeprefix('w')} bits {100 * right['qsun']:.1f} % by engine qsun and "
                    f"{100 * right['llmcompressor']:.1f} % by llm-compressor's AWQ, bfloat16 "
                    f"{100 * right['full_precision']:.1f} % ({least:+.1f} to {most:+.1f} between "
                    f"the engines; {right['prompts']} prompts of {test})"
                )
    return f"Right answers, {results[0]['samples']} samples: {'; '.join(told)}."
