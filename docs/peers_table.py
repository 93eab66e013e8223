"""A table of quantizers side by side, from a record of `tests/compare_peers.py`.

Run `python docs/peers_table.py [RECORD]` to see it; the README has none before a record is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qsun.records import Record, read_record

RECORD = Path(__file__).parent / "records" / "peers-smollm2.json"
OURS, FULL = "qsun", "full precision"


def table(path: Path = RECORD, model: str = "SmolLM2-135M-Instruct") -> str:
    """Quantizers down, measures across."""
    record = read_record(path, "peers-comparison")
    result = record.result
    tasks = list(result["response_tokens"])
    tests = list(result[FULL].get("right", {}))
    right = [f"{test} right, %" for test in tests]
    head = [model, *tasks, *right, "perplexity", "processor minutes", "GiB"]
    rows = [[FULL, *_measures(result[FULL], tasks, tests), "", ""]]
    for bits, subjects in result["bits"].items():
        for name, found in subjects.items():
            label = f"**{name}**" if name == OURS else name
            rows.append(
                [
                    f"{bits[1:]} bits: {label}",
                    *_measures(found, tasks, tests),
                    *_cost(found["cost"]),
                ]
            )
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", _legend(record, tasks)]) + "\n"


def _measures(found: dict[str, Any], tasks: list[str], tests: list[str]) -> list[str]:
    """Nats per token by task, right answers by test set, perplexity."""
    against = found.get(OURS, {})
    cells = []
    for task in tasks:
        nats = found.get("nats_per_token", {}).get(task)
        cells.append("" if nats is None else f"{nats:.3f}" + _interval(against, "lower_by", task))
    for test in tests:
        share = found.get("right", {}).get(test)
        shown = "" if share is None else f"{100 * share:.1f}"
        cells.append(shown + _interval(against, "more_right_by", test, 100, 1))
    perplexity = found.get("perplexity")
    return [*cells, "" if perplexity is None else f"{perplexity:,.1f}"]


def _interval(
    against: dict[str, Any], measure: str, of: str, scale: float = 1, digits: int = 3
) -> str:
    """How far qsun is ahead, as an interval."""
    if of not in against.get(measure, {}):
        return ""
    low, high = (scale * value for value in against[measure][of]["interval"])
    return f" ({low:+.{digits}f} to {high:+.{digits}f})"


def _cost(cost: dict[str, Any]) -> list[str]:
    return [f"{cost['processor_s'] / 60:.1f}", f"{cost['peak_memory_bytes'] / 2**30:.1f}"]


def _legend(record: Record, tasks: list[str]) -> str:
    result, machine = record.result, record.hardware
    sampled = [source["name"] for source in result["samples"]["sources"]]
    unseen = [task for task in tasks if task not in sampled]
    versions: dict[str, str] = {}
    iterations = set()
    for subjects in result["bits"].values():
        for found in subjects.values():
            versions |= found["cost"]["versions"]
            chosen = found["cost"].get("settings")
            if isinstance(chosen, dict) and "iters" in chosen:
                iterations.add(chosen["iters"])
    named = ("llmcompressor", "gptqmodel", "auto-round")
    packages = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    rounds = ""
    if iterations:
        counts = " and ".join(map(str, sorted(iterations)))
        rounds = f" auto-round took {counts} iterations a block (its default: 200)."
    nothing = f"; no sample is of {', '.join(unseen)}" if unseen else ""
    return (
        f"Weights alone, asymmetric, groups of 64, no head; {result['samples']['samples']} samples "
        f"of {', '.join(sampled)}, the same for all. By task: nats a token of "
        f"{result['rows']} responses behind its prefill module's cache, lower is better{nothing}. "
        "In brackets, 95 % paired bootstrap: by how much qsun is better. Perplexity is of plain "
        f"text without a prefill module. Each in a process of its own on {machine['cores']} cores "
        f"({machine['processor']}): {packages}.{rounds} By `tests/compare_peers.py`."
    )


if __name__ == "__main__":
    print(table(*(Path(path) for path in sys.argv[1:2])))
