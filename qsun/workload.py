"""Workloads: who asks for what, when, and how long; drawn from a seed, or read from a trace.

The load generator asks a served bundle for these requests, the simulator its model of one: both
see the same ones. A trace is JSONL in Mooncake's form (`timestamp` in milliseconds, `input_length`,
`output_length`), with the `task` beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from qsun.errors import DataError, bullet_list, nearest

LENGTHS = {"fixed": 1, "uniform": 2, "lognormal": 2, "geometric": 1}  # and their parameters
ARRIVALS = {"poisson": 0, "constant": 0, "bursty": 1}
LEAST_PROMPT = 2  # of one token, all is the decode module's to read
SHOWN_PROBLEMS = 12


@dataclass(frozen=True)
class Request:
    """One request: when it comes, seconds from the start, and its tokens."""

    at_s: float
    task: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """How requests come, whose they are and how long.

    Open loop at `rate_per_s`, whatever becomes of them, or closed loop: each of `concurrency` users
    asks again once answered. `arrivals`: `poisson`, `constant`, or `bursty:CV`, gamma distributed
    gaps of that coefficient of variation. The k-th of the tasks has a share proportional to
    k^-alpha (Zipf's law; 0 is even). Lengths, tokens: `fixed:N`, `uniform:LEAST:MOST`,
    `lognormal:MEDIAN:SIGMA` or `geometric:MEAN`; prompts are cut so that both fit in `max_tokens`.
    """

    rate_per_s: float | None = field(default=None, metadata={"minimum": 1e-6})
    concurrency: int | None = field(default=None, metadata={"minimum": 1})
    arrivals: str = "poisson"
    alpha: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 20.0})
    prompt_tokens: str = "fixed:256"
    output_tokens: str = "fixed:64"
    max_tokens: int = field(default=2**17, metadata={"minimum": 3})


def problems_of(workload: Workload) -> list[str]:
    """What is wrong with a workload, in words; nothing where it can be drawn."""
    found = []
    if (workload.rate_per_s is None) == (workload.concurrency is None):
        found.append("one of rate_per_s (open loop) and concurrency (closed loop) must be given")
    found += _form_problems("arrivals", workload.arrivals, ARRIVALS)
    for name in ("prompt_tokens", "output_tokens"):
        found += _form_problems(name, getattr(workload, name), LENGTHS)
    # Those without a largest length are cut off; what was asked for by number is not.
    asked = [] if found else [workload.prompt_tokens, workload.output_tokens]
    bounded = [_form(one)[1][-1] for one in asked if _form(one)[0] in ("fixed", "uniform")]
    if sum(bounded) > workload.max_tokens:
        found.append(
            f"prompt and output of {sum(bounded):.0f} tokens: {workload.max_tokens} are served"
        )
    return found


def zipf_shares(tasks: int, alpha: float) -> np.ndarray:
    """Each task's share of all requests, the first task's the largest; they add up to 1."""
    weights = np.arange(1, tasks + 1, dtype=float) ** -alpha
    return np.asarray(weights / weights.sum())


def open_loop(
    workload: Workload, tasks: Sequence[str], duration_s: float, seed: int
) -> list[Request]:
    """All requests of `duration_s` seconds, in the order in which they come."""
    assert workload.rate_per_s is not None
    dice = np.random.default_rng(seed)
    mean_s, at_s = 1 / workload.rate_per_s, 0.0
    found: list[Request] = []
    kind, parameters = _form(workload.arrivals)
    while True:
        if kind == "constant":
            at_s += mean_s
        else:
            shape = 1.0 if kind == "poisson" else parameters[0] ** -2
            at_s += dice.gamma(shape, mean_s / shape)
        if at_s >= duration_s:
            return found
        found.append(_request(workload, tasks, at_s, dice))


def closed_loop(workload: Workload, tasks: Sequence[str], seed: int) -> Iterator[Request]:
    """Requests without end; each comes when a user is free for it, and says 0 seconds."""
    dice = np.random.default_rng(seed)
    for _ in count():
        yield _request(workload, tasks, 0.0, dice)


def read_trace(path: Path, tasks: Sequence[str], max_tokens: int = 2**17) -> list[Request]:
    """The requests of a recorded trace, in the order in which they come, the first at 0 seconds.

    Raises:
        DataError: unreadable, empty, or with lines that are wrong or of more than `max_tokens`
            tokens; names them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read trace {path}: {error}") from error
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_traced(json.loads(line), tasks, max_tokens))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            wrong.append(f"line {number}: {reason}")
    if wrong:
        raise DataError(f"trace {path}:\n{bullet_list(wrong, SHOWN_PROBLEMS)}")
    if not found:
        raise DataError(f"trace {path} has no request")
    found.sort(key=lambda one: one.at_s)
    first = found[0].at_s
    return [
        Request(one.at_s - first, one.task, one.prompt_tokens, one.output_tokens) for one in found
    ]


def trace_lines(requests: Sequence[Request]) -> str:
    """Requests as a trace."""
    return "".join(
        json.dumps(
            {
                "timestamp": round(1000 * one.at_s, 3),
                "task": one.task,
                "input_length": one.prompt_tokens,
                "output_length": one.output_tokens,
            }
        )
        + "\n"
        for one in requests
    )


def _traced(value: dict[str, object], tasks: Sequence[str], max_tokens: int) -> Request:
    task = str(value["task"])
    if task not in tasks:
        raise ValueError(f"task {task} is not served ({nearest(task, tasks)})")
    at_s = float(str(value["timestamp"])) / 1000
    prompt, output = (int(str(value[name])) for name in ("input_length", "output_length"))
    if not 0 <= at_s < float("inf") or prompt < LEAST_PROMPT or output < 1:
        raise ValueError("a timestamp from 0 on, a prompt of 2 tokens or more, an output of 1")
    if prompt + output > max_tokens:
        raise ValueError(f"{prompt} and {output} tokens: {max_tokens} are served")
    return Request(at_s, task, prompt, output)


def _request(
    workload: Workload, tasks: Sequence[str], at_s: float, dice: np.random.Generator
) -> Request:
    task = tasks[dice.choice(len(tasks), p=zipf_shares(len(tasks), workload.alpha))]
    prompt = _length(workload.prompt_tokens, dice)
    output = min(_length(workload.output_tokens, dice), workload.max_tokens - LEAST_PROMPT)
    prompt = max(LEAST_PROMPT, min(prompt, workload.max_tokens - output))
    return Request(at_s, task, prompt, output)


def _length(form: str, dice: np.random.Generator) -> int:
    kind, parameters = _form(form)
    if kind == "fixed":
        drawn = parameters[0]
    elif kind == "uniform":
        drawn = float(dice.integers(int(parameters[0]), int(parameters[1]), endpoint=True))
    elif kind == "lognormal":
        drawn = float(dice.lognormal(math.log(parameters[0]), parameters[1]))
    else:
        drawn = float(dice.geometric(1 / parameters[0]))
    return max(1, round(drawn))


def _form(text: str) -> tuple[str, list[float]]:
    kind, *parameters = text.split(":")
    return kind, [float(one) for one in parameters]


def _form_problems(name: str, text: str, known: dict[str, int]) -> list[str]:
    forms = ", ".join(":".join([kind, *("NUMBER",) * number]) for kind, number in known.items())
    try:
        kind, parameters = _form(text)
    except ValueError:
        return [f"{name}: {text} has what is no number; give {forms}"]
    if kind not in known or len(parameters) != known[kind]:
        return [f"{name}: {text} is not one of {forms}"]
    if any(not 0 < one < float("inf") for one in parameters):
        return [f"{name}: {text} has a number that is not above 0"]
    if known is LENGTHS and parameters[0] < 1:
        return [f"{name}: {text} has less than a token"]
    if kind == "uniform" and parameters[0] > parameters[1]:
        return [f"{name}: {text} has its larger number first"]
    return []
