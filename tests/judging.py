"""Judging a decode module: where it is served, on other text, and by its answers.

All of it is behind the caches of real prefill modules but the plain perplexity. Every number comes
row by row, so that two decode modules can be compared on the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from qsun.calibrate.definition import load_definition
from qsun.calibrate.samples import read_sources, tokenize_sources
from qsun.chats import encode_prompts
from qsun.handoff import Boundary, KvCache, body, log_likelihood
from qsun.models import load_tokenizer
from qsun.prefill_module import load_prefill
from qsun.progress import track
from qsun.quantize.perplexity import perplexity
from qsun.tasks.checkers import CHECKERS
from qsun.tasks.definition import TaskDefinition, load_task
from qsun.tasks.examples import Example, read_tests, read_validation
from qsun.tune.batches import Row, batch_of, encode_examples
from qsun.tune.judge import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "calib" / "tasks"
HELDOUT = ROOT / "calib" / "heldout.yaml"
REFERENCE = ROOT / "exports" / "reference"
ANSWERED = {"math": "seen", "tools": "simple"}  # the test set that answers are judged on
CALLS = "function-calls"
RESAMPLES = 10_000
BATCH_TOKENS = 4096
GENERATED_AT_ONCE = 64

Measured = dict[str, list[float]]


@dataclass(frozen=True)
class Judging:
    """What a decode module is judged by: tasks with their prefill modules on one base checkpoint.

    `rows` validation rows of each task, `tests` prompts of each test set, at most. `answered` names
    the test set, of those in the folder `definitions`, on which a task's answers are judged.
    """

    base: Path
    prefill: Mapping[str, Path]
    rows: int
    tests: int = 0
    definitions: Path = TASKS
    answered: Mapping[str, str] = field(default_factory=lambda: ANSWERED)
    _loaded: dict[str, PreTrainedModel] = field(default_factory=dict)

    @cached_property
    def validation(self) -> dict[str, list[Row]]:
        """Validation rows of each task as tokens, in the definition's order."""
        found = {}
        for name in self.prefill:
            task = self._task(name)
            examples = read_validation(task, self.definitions)[: self.rows]
            found[name] = encode_examples(examples, self._tokenizer, task.max_tokens, name).rows
        return found

    @property
    def tokens(self) -> dict[str, np.ndarray]:
        """How many tokens each row's response has."""
        return {
            task: np.array([len(row.response) for row in rows])
            for task, rows in self.validation.items()
        }

    def likelihoods(self, decode: PreTrainedModel, what: str) -> Measured:
        """Negative log-likelihood of every row's response behind its task's cache, nats."""
        decode.to(_device())
        found = {}
        for task, rows in self.validation.items():
            values, batches = np.zeros(len(rows)), _batches(rows)
            for batch in track(batches, f"{what}, {task}", len(batches)):
                one = batch_of([rows[index] for index in batch]).to(decode.device)
                with torch.no_grad():
                    scores = log_likelihood(self._prefill(task), decode, one)
                values[batch] = -scores.double().cpu().numpy()
            found[task] = values.tolist()
        return found

    def answers(self, decode: PreTrainedModel) -> Measured:
        """Whether the greedy answer to each test prompt is right, 1 or 0, by `task.test`.

        Where answers are function calls, also whether it is by its first call alone.
        """
        decode.to(_device())
        found = {}
        for name, test in self.answered.items():
            if name not in self.prefill:
                continue
            task, examples = self._task(name), self._examples[name]
            judge = Judge(task, self._tokenizer, Boundary.BEFORE_LAST, 1, GENERATED_AT_ONCE)
            prompts = encode_prompts(
                [(one.messages, one.source) for one in examples], self._tokenizer
            )
            made = judge.responses(self._prefill(name), decode, prompts)
            right = CHECKERS[str(task.checker)](made, [one.answer for one in examples])
            found[f"{name}.{test}"] = [float(one) for one in right]
            if task.checker == CALLS:
                once = CHECKERS[CALLS](
                    list(map(first_call, made)), [one.answer for one in examples]
                )
                found[f"{name}.{test}, first call"] = [float(one) for one in once]
        return found

    def perplexity(self, decode: PreTrainedModel, what: str) -> float:
        """Perplexity of held-out text that the decode module reads by itself."""
        return perplexity(decode.to(_device()), self._heldout, f"{what}, perplexity")

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def _heldout(self) -> list[list[int]]:
        definition = load_definition(HELDOUT)
        sources = read_sources(definition, HELDOUT.parent)
        return tokenize_sources(sources, definition, self._tokenizer).tokens

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """The first prompts of the test set that each task's answers are judged on."""
        return {
            name: read_tests(self._task(name), self.definitions)[test][: self.tests]
            for name, test in self.answered.items()
            if name in self.prefill
        }

    def _task(self, name: str) -> TaskDefinition:
        return load_task(self.definitions / f"{name}.yaml")

    def _prefill(self, task: str) -> PreTrainedModel:
        if task not in self._loaded:
            module = load_prefill(self.prefill[task], self.base, "bfloat16")
            self._loaded[task] = cast("PreTrainedModel", Remembering(module.to(_device())))
        return self._loaded[task]


def first_call(answer: str) -> str:
    """A list of calls cut off after the first, also one without end; anything else as it is."""
    try:
        call, _ = json.JSONDecoder().raw_decode(answer, max(0, answer.find("{")))
    except ValueError:
        return answer
    return json.dumps([call])


class Remembering:
    """A prefill module that reads each batch of prompts once: what it wrote serves all decoders."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._stack = body(module)
        self._written: dict[bytes, KvCache] = {}
        self.config = self._stack.config

    def get_decoder(self) -> Remembering:
        """Itself: only its stack of layers is ever asked."""
        return self

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        """Write the cache of prompts `[rows, positions]`; what they became is told once."""
        batch = bytes(str(tuple(input_ids.shape)), "ascii") + input_ids.cpu().numpy().tobytes()
        if batch not in self._written:
            found = self._stack(
                input_ids=input_ids, past_key_values=past_key_values, use_cache=True
            )
            self._written[batch] = [(one.keys, one.values) for one in past_key_values.layers]
            return found
        for layer, written in zip(past_key_values.layers, self._written[batch], strict=True):
            layer.update(*written)
        return SimpleNamespace(last_hidden_state=None)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _batches(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of rows of like length together, about `BATCH_TOKENS` tokens each."""
    found: list[list[int]] = [[]]
    for index in sorted(range(len(rows)), key=lambda one: len(rows[one])):
        if found[-1] and (len(found[-1]) + 1) * len(rows[index]) > BATCH_TOKENS:
            found.append([])
        found[-1].append(index)
    return found


def mean(values: Sequence[float], weights: np.ndarray) -> float:
    """Of sums over rows, such as nats, over rows' weights, such as tokens."""
    return float(np.sum(values) / weights.sum())


def lower_by(
    ours: Sequence[float], theirs: Sequence[float], weights: np.ndarray
) -> dict[str, float | list[float]]:
    """By how much `ours` is lower than `theirs`, per weight, with a 95 % interval.

    The interval is of a paired bootstrap over rows.
    """
    lower = np.array(theirs) - np.array(ours)
    drawn = np.random.default_rng(0).integers(len(lower), size=(RESAMPLES, len(lower)))
    found = lower[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    return {
        "difference": float(lower.sum() / weights.sum()),
        "interval": np.quantile(found, (0.025, 0.975)).tolist(),
    }
