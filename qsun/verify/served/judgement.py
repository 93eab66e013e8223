"""From what workers answered and what this process computes to checks; nothing is asked here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.disaggregation import Answer
from qsun.verdict import Check, Outcome
from qsun.verify.served.answers import Served, difference
from qsun.verify.served.in_process import Scored
from qsun.verify.steps import enumerated

LOOK_AT_WORKERS = "Look at the workers' output; start them as the exported launch spec says."


@dataclass(frozen=True)
class ServedCheckConfig:
    """What is asked of the workers, and when served modules count as the bundle's.

    Prompts have `prompt_tokens` tokens each, as far as the bundle's `max_tokens` reaches: around
    the sizes of cache blocks, and the shortest there is. Limits are in nats, compared unrounded:
    the answers' log-probabilities may be `max_mean_difference` from those in process on average
    over all prompts, and `max_prompt_difference` for any one; no chosen token may be less likely
    there than another by more than `max_greedy_gap`, eight steps of a bfloat16 logit above 16.
    Where modules differ, predictions do by at least `min_difference`.
    """

    prompt_tokens: tuple[int, ...] = (2, 15, 16, 17, 127, 128, 129, 513)
    new_tokens: int = 8
    next_turn_of: int = 127
    max_mean_difference: float = 0.1
    max_prompt_difference: float = 0.25
    max_greedy_gap: float = 1.0
    min_difference: float = 0.02
    start_timeout_s: int = 300


@dataclass(frozen=True)
class Judged:
    """One task's answers beside the same in process; `scored` lacks failed hand-offs.

    `bytes_per_token` is what one token's K and V take; `same_weights` whether P and D are one.
    """

    task: str
    served: Sequence[Served]
    scored: Sequence[Scored | None]
    bytes_per_token: int
    same_weights: bool


def task_checks(judged: Judged, settings: ServedCheckConfig) -> list[Check]:
    """The five checks of a task."""
    return [
        _hand_off(judged),
        _one_prompt_token(judged),
        _refuses(judged),
        _differs(judged, settings),
        _in_process(judged, settings),
    ]


def check_names(task: str) -> list[str]:
    """What `task_checks` calls its checks."""
    return [
        f"served.{what}.{task}"
        for what in ("hand_off", "one_prompt_token", "refuses", "differs", "in_process")
    ]


def _hand_off(judged: Judged) -> Check:
    """Every prompt came over, whole, by one transfer."""
    wrong = _grouped(
        (problem, one)
        for one in judged.served
        for problem in _transfer_problems(one, judged.bytes_per_token)
    )
    lengths = ", ".join(one.label for one in judged.served)
    return _check(
        f"served.hand_off.{judged.task}",
        "prompts sent through the prefill worker to the decode worker",
        wrong,
        f"{len(judged.served)} prompts came over: {lengths}",
        LOOK_AT_WORKERS,
        {"prompts": [one.summary() for one in judged.served]},
    )


def _grouped(problems: Iterable[tuple[str, Served]]) -> list[str]:
    """Each problem once, with the prompts that have it."""
    prompts: dict[str, list[str]] = {}
    for problem, served in problems:
        prompts.setdefault(problem, []).append(served.label)
    return [f"{', '.join(labels)}: {problem}" for problem, labels in prompts.items()]


def _transfer_problems(served: Served, bytes_per_token: int) -> Iterator[str]:
    counts = served.counts
    if counts is None:
        yield str(served.error).splitlines()[0]
        return
    if counts.transfers < 1:
        yield "the decode worker fetched nothing"
    if counts.failed_transfers:
        yield f"{counts.failed_transfers} transfers failed"
    if counts.preemptions:
        yield f"the decode worker dropped it {counts.preemptions} times and read it again"
    least = (len(served.prompt) - 1) * bytes_per_token
    if counts.transfers and counts.transferred_bytes < least:
        yield f"{counts.transferred_bytes} bytes came over, {least} are its cache"


def _one_prompt_token(judged: Judged) -> Check:
    """All but the last prompt token came from P: nothing was computed by D, or cached by it."""
    asked = [one for one in judged.served if one.counts is not None]
    wrong = _grouped((problem, one) for one in asked for problem in _source_problems(one))
    return _check(
        f"served.one_prompt_token.{judged.task}",
        "where the decode worker had each prompt's tokens from, by its own count",
        wrong if asked else ["no hand-off took place"],
        f"of {len(asked)} prompts it computed the last token alone, the rest came over",
        "The decode worker must not read prompts: its connector has to be on, its requests have "
        "to carry kv_transfer_params, and its prefix cache has to be off.",
    )


def _source_problems(served: Served) -> Iterator[str]:
    counts, length = served.counts, len(served.prompt)
    assert counts is not None
    # vLLM 0.32 counts the last token as transferred; one that counted what it computes says 1.
    if counts.computed > 1:
        whole = counts.computed == length
        yield f"the decode worker computed {'all of it' if whole else counts.computed}"
    if counts.cached:
        yield f"{counts.cached} came from the decode worker's own cache"
    if counts.transferred < length - 1:
        yield f"{counts.transferred or 'nothing'} came over"
    if counts.prompt_tokens != length:
        yield f"{counts.prompt_tokens} were counted: is anybody else using this worker?"


def _refuses(judged: Judged) -> Check:
    """The decode worker answers nothing that no prefill module has read."""
    asked = [one for one in judged.served if one.counts is not None]
    wrong = _grouped(
        ("the decode worker read it by itself, and answered", one) for one in asked if one.alone
    )
    return _check(
        f"served.refuses.{judged.task}",
        "the decode worker, asked for the same prompts without a cache to fetch",
        wrong if asked else ["no hand-off took place"],
        f"it refused all of {len(asked)} prompts",
        "Start the decode worker with its guard, as the exported launch spec says.",
    )


def _differs(judged: Judged, settings: ServedCheckConfig) -> Check:
    """The hand-off is not the prefill module alone, by predicted log-probabilities."""
    name = f"served.differs.{judged.task}"
    compared = "predictions through the hand-off with those of the prefill module alone"
    answers = [
        (one.handed, one.prefill_alone) for one in judged.served if one.handed and one.prefill_alone
    ]
    if not answers:
        return _check(name, compared, ["no hand-off took place"], "", LOOK_AT_WORKERS)
    apart = _mean_difference(answers)
    values = {
        "from_prefill_alone": apart,
        "other_text_than_prefill_alone": sum(a.tokens != b.tokens for a, b in answers),
        "prompts": len(answers),
        "same_weights": judged.same_weights,
    }
    if judged.same_weights:
        message = f"prefill and decode module are the same weights; {apart:.3f} nats apart"
        return Check(name, Outcome.PASSED, compared, message, values=values)
    least = settings.min_difference
    wrong = f"they are the prefill module's ({apart:.3f} nats away, at least {least} expected)"
    remedy = "The decode worker must be another one than the prefill worker, with its own module."
    found = f"{apart:.3f} nats apart"
    return _check(name, compared, [] if apart >= least else [wrong], found, remedy, values)


def _mean_difference(pairs: Sequence[tuple[Answer, Answer]]) -> float:
    return sum(difference(first, second) for first, second in pairs) / len(pairs)


def _in_process(judged: Judged, settings: ServedCheckConfig) -> Check:
    """The served answers are what the bundle's two modules say in this process."""
    figures = [
        _figures(one, one.handed, scored)
        for one, scored in zip(judged.served, judged.scored, strict=True)
        if one.handed is not None and scored is not None
    ]
    wrong = list(_distances(figures, settings)) if figures else ["no hand-off took place"]
    tokens = [apart for one in figures for apart in one["differences"]]
    mean = sum(tokens) / len(tokens) if tokens else 0.0
    gap = max((one["largest_gap"] for one in figures), default=0.0)
    return _check(
        f"served.in_process.{judged.task}",
        "the served answers with the bundle's modules in this process",
        wrong,
        f"{mean:.3f} nats apart on average over {len(tokens)} tokens; no chosen token is more "
        f"than {gap:.2f} from the likeliest",
        "The prefill worker must serve the module in the bundle under the task's name, and the "
        "decode worker the bundle's decode module.",
        {"mean_difference": mean, "largest_gap": gap, "prompts": figures},
    )


def _figures(served: Served, handed: Answer, scored: Scored) -> dict[str, Any]:
    differences = [
        abs(ours - theirs)
        for ours, theirs in zip(handed.log_probabilities, scored.log_probabilities, strict=True)
    ]
    return {
        "prompt": served.label,
        "mean_difference": sum(differences) / len(differences),
        "differences": differences,
        "largest_gap": max(scored.gaps),
    }


def _distances(figures: Sequence[dict[str, Any]], settings: ServedCheckConfig) -> Iterator[str]:
    """Every limit that is broken, written so that NaN breaks it."""
    tokens = [apart for one in figures for apart in one["differences"]]
    mean = sum(tokens) / len(tokens)
    if not mean <= settings.max_mean_difference:
        yield f"{mean:.3f} nats apart on average, {settings.max_mean_difference} allowed"
    for one in figures:
        if not one["mean_difference"] <= settings.max_prompt_difference:
            yield f"{one['prompt']}: {one['mean_difference']:.3f} nats apart on average"
        if not one["largest_gap"] <= settings.max_greedy_gap:
            yield f"{one['prompt']}: a chosen token is {one['largest_gap']:.2f} from the likeliest"


def _check(
    name: str,
    compared: str,
    wrong: Sequence[str],
    found: str,
    remedy: str,
    values: dict[str, Any] | None = None,
) -> Check:
    if wrong:
        return Check(name, Outcome.FAILED, compared, enumerated(wrong), remedy, values)
    return Check(name, Outcome.PASSED, compared, found, values=values)
