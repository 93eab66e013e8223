"""Judging: in batches and from remembered caches as one row at a time, each row on its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qsun.handoff import collate, log_likelihood
from qsun.models import load_model
from qsun.prefill_module import load_prefill, save_prefill
from qsun.rounding import round_layers
from qsun.scheme import Scheme
from tests.builders import tiny_model
from tests.judging import Judging, first_call, lower_by, mean
from tests.peers.layers import linear_layers
from tests.reference import with_adapter
from tests.tuning import write_task


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Judging:
    folder = tmp_path_factory.mktemp("judging")
    tiny_model(folder / "base")
    module = with_adapter(load_model(folder / "base", "bfloat16"), 3)
    save_prefill(module, folder / "lora", torch.bfloat16, "../base")
    write_task(folder)
    prefill = {"task": folder / "lora"}
    return Judging(folder / "base", prefill, 5, 3, folder, {"task": "tests"})


def decoders(base: Path) -> list[torch.nn.Module]:
    """The base model, and itself rounded to 2 bits."""
    exact, rounded = load_model(base, "bfloat16"), load_model(base, "bfloat16")
    round_layers(rounded, linear_layers(rounded), Scheme("compressed-tensors", 2, 64, False))
    return [exact, rounded]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_likelihoods_are_those_of_each_row_alone_for_one_decoder_after_another(
    judging: Judging, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.judging.BATCH_TOKENS", batch_tokens)
    prefill = load_prefill(judging.prefill["task"], judging.base, "bfloat16")
    rows = judging.validation["task"]
    assert len(rows) == 5
    found = []
    for decode in decoders(judging.base):
        found.append(judging.likelihoods(decode, "test")["task"])
        alone = [
            -float(log_likelihood(prefill, decode, collate([row.prompt], [row.response])))
            for row in rows
        ]
        assert found[-1] == pytest.approx(alone, rel=0.02)
    assert found[0] != pytest.approx(found[1], rel=0.02)


def test_answers_are_the_same_from_a_remembered_cache(judging: Judging) -> None:
    decode, _ = decoders(judging.base)
    first = judging.answers(decode)
    assert list(first) == ["task.tests"]
    assert len(first["task.tests"]) == 3
    assert judging.answers(decode) == first


def test_the_first_call_is_all_that_is_left_of_calls() -> None:
    one = '[{"name": "f", "arguments": {"a": {"b": 1}}}]'
    assert first_call(one) == one
    for more in (', {"name": "g", "arguments": {}}]', ', {"name": "f", "argum', ", "):
        assert first_call(one.removesuffix("]") + more) == one
    for no_call in ("", "none", '[{"name": "f", "argum'):
        assert first_call(no_call) == no_call


def test_what_is_lower_row_by_row_is_lower_for_sure() -> None:
    tokens = np.array([10, 20, 30])
    theirs = np.array([5.0, 8.0, 18.0])
    found = lower_by(list(theirs - 0.1 * tokens), list(theirs), tokens)
    assert found["difference"] == pytest.approx(0.1)
    assert found["interval"] == pytest.approx([0.1, 0.1])
    assert mean(list(theirs), tokens) == pytest.approx(31 / 60)
    mixed = theirs + np.array([1.0, -1.0, 0.0])
    worse = lower_by(list(mixed), list(theirs), tokens)["interval"]
    assert isinstance(worse, list)
    assert worse[0] < 0 < worse[1]
