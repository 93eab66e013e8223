"""The README's table of quantizers side by side, from records of `tests/compare_peers.py`.

Records of one comparison, each with some of its subjects, are read together.
"""

from __future__ import annotations

from math import isclose
from pathlib import Path
from typing import Any

from qsun.records import Record, read_record

RECORDS = Path(__file__).parent / "records"
SMOLLM2, QWEN3 = RECORDS / "peers-smollm2", RECORDS / "peers-qwen3"
OURS, FULL = "qsun", "full precision"


def tables() -> str:
    """The README's: SmolLM2 with the legend, then the small Qwen3."""
    _, _, small = _rows(QWEN3, "small Qwen3, from scratch")
    return "\n".join(
        [
            table(SMOLLM2),
            *small,
            "",
            "The same, on the Qwen3 of 12 layers that was pretrained on these tasks' rows alone "
            "(see above). Its perplexity on other text says nothing, nor do its tools: full "
            "precision has no call right.",
            "",
            f"{_standing(SMOLLM2, 'SmolLM2')} {_standing(QWEN3, 'The small Qwen3')}",
            "",
        ]
    )


def table(folder: Path, model: str = "SmolLM2-135M-Instruct") -> str:
    """Quantizers down, measures across; the worse on the first task come first."""
    record, result, lines = _rows(folder, model)
    return "\n".join([*lines, "", _legend(record, result, list(result["response_tokens"]))]) + "\n"


def _rows(folder: Path, model: str) -> tuple[Record, dict[str, Any], list[str]]:
    """A folder's records as one, and the table's lines."""
    records = [read_record(path, "peers-comparison") for path in sorted(folder.glob("*.json"))]
    record, result = records[0], joined([one.result for one in records])
    tasks = list(result["response_tokens"])
    tests = list(result[FULL].get("right", {}))
    right = [f"{test} right, %" for test in tests]
    head = [model, *tasks, *right, "perplexity", "minutes", "GiB", "GPU GiB"]
    rows = [[FULL, *_measures(result[FULL], tasks, tests), "", "", ""]]
    for bits, subjects in sorted(result["bits"].items(), reverse=True):
        ordered = sorted(subjects.items(), key=lambda one: -one[1]["nats_per_token"][tasks[0]])
        for name, found in ordered:
            label = f"**{name}**" if name == OURS else name
            rows.append(
                [
                    f"{bits[1:]} bits: {label}",
                    *_measures(found, tasks, tests),
                    *_cost(found["cost"]),
                ]
            )
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
    return record, result, lines


def _standing(folder: Path, model: str) -> str:
    """How many others qsun is better than on the first task, by the interval, and how many tie."""
    _, result, _ = _rows(folder, model)
    task, told = next(iter(result["response_tokens"])), []
    for bits, subjects in sorted(result["bits"].items(), reverse=True):
        between = [
            found[OURS]["lower_by"][task]["interval"]
            for name, found in subjects.items()
            if name != OURS
        ]
        better, worse = sum(low > 0 for low, _ in between), sum(high < 0 for _, high in between)
        told.append(
            f"{bits[1:]} bits better than {better}, tied with {len(between) - better - worse}, "
            f"worse than {worse}"
        )
    return f"{model}, {task}, qsun's nats against the other quantizers': {'; '.join(told)}."


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result with the subjects of all, which are of the same samples, rows and tests.

    Full precision, judged on every host anew, agrees but for rounding.
    """
    same = ("samples", "rows", "tests", "response_tokens")
    first = results[0]
    bits: dict[str, dict[str, Any]] = {}
    for result in results:
        assert all(result[key] == first[key] for key in same), "one comparison's records"
        for task, nats in result[FULL]["nats_per_token"].items():
            assert isclose(nats, first[FULL]["nats_per_token"][task], rel_tol=1e-4), "one model's"
        for name, subjects in result["bits"].items():
            bits[name] = bits.get(name, {}) | subjects
    return {**first, "bits": bits}


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
    on_gpu = cost.get("peak_gpu_bytes")
    return [
        f"{cost['wall_s'] / 60:.1f}",
        f"{cost['peak_memory_bytes'] / 2**30:.1f}",
        f"{on_gpu / 2**30:.1f}" if on_gpu else "",
    ]


def _legend(record: Record, result: dict[str, Any], tasks: list[str]) -> str:
    machine = record.hardware
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
        f"text without a prefill module. Each in a process of its own on "
        f"{machine.get('accelerator') or machine['processor']}, several at a time, so that "
        "minutes are rough: "
        f"{packages}.{rounds} By `tests/compare_peers.py`."
    )
