"""The hand-off: one model handing to itself is that model, at every length and boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from qsun.handoff import Batch, Boundary, collate, log_likelihood, response_logits, single_logits
from tests.reference import (
    SHAPES,
    SMOLLM2,
    by_hand,
    frozen,
    merged,
    random_rows,
    single_model_logits,
    tiny,
    with_adapter,
)

PROMPT_LENGTHS = (2, 3, 16, 15, 17, 63, 128, 127, 300, 129)
RESPONSE_LENGTHS = (1, 30, 2, 7, 29, 1, 16, 3, 11, 30)
# Where prefill and decode module differ: few rows, because the reference goes token by token.
FEW = slice(1, None, 3)
# Of logits whose standard deviation is 1.2 (tiny) and 3 (SmolLM2): float32's rounding, which
# padding and splitting change. Seen: at most 1e-5 and 6e-5.
TOLERANCE = {SMOLLM2: 2e-4} | dict.fromkeys(SHAPES, 4e-5)
MODELS = [*SHAPES, SMOLLM2]
BOUNDARIES = list(Boundary)


@cache
def rows(name: str) -> tuple[list[list[int]], list[list[int]]]:
    every = 1 if name != SMOLLM2 else 2  # a second's work a row
    vocabulary = frozen(name).config.vocab_size
    return random_rows(PROMPT_LENGTHS[::every], RESPONSE_LENGTHS[::every], vocabulary=vocabulary)


@cache
def expected(name: str) -> list[torch.Tensor]:
    """Plain transformers, a row at a time, without padding."""
    return [single_model_logits(frozen(name), *row) for row in zip(*rows(name), strict=True)]


def assert_close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", MODELS)
def test_one_model_handing_to_itself_is_that_model(name: str, boundary: Boundary) -> None:
    model = frozen(name)
    with torch.no_grad():
        together = response_logits(model, model, collate(*rows(name)), boundary)
    assert together.shape == (sum(map(len, rows(name)[1])), model.config.vocab_size)
    assert_close(together, torch.cat(expected(name)), name)
    # So tight a tolerance says something: one token further on, logits are elsewhere.
    assert (together[1:] - together[:-1]).abs().mean() > 1000 * TOLERANCE[name]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_row_alone_is_that_model_too(name: str, boundary: Boundary) -> None:
    model = frozen(name)
    for prompt, response, logits in zip(*rows(name), expected(name), strict=True):
        with torch.no_grad():
            alone = response_logits(model, model, collate([prompt], [response]), boundary)
        assert_close(alone, logits, name)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_prompt_length_from_2_to_300(boundary: Boundary) -> None:
    model = frozen("llama-gqa")
    lengths = range(2, 301)
    prompts, responses = random_rows(lengths, [1 + length * 7 % 30 for length in lengths], seed=1)
    wanted = [single_model_logits(model, *row) for row in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        found = response_logits(model, model, collate(prompts, responses), boundary)
    assert_close(found, torch.cat(wanted), "llama-gqa")


@pytest.mark.parametrize("name", MODELS)
def test_single_logits_are_the_models_own(name: str) -> None:
    with torch.no_grad():
        found = single_logits(frozen(name), collate(*rows(name)))
    assert_close(found, torch.cat(expected(name)), name)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_responses_of_one_token_alone(boundary: Boundary) -> None:
    model = frozen("llama-gqa")
    prompts, responses = random_rows((2, 5, 3), (1, 1, 1))
    wanted = [single_model_logits(model, *row) for row in zip(prompts, responses, strict=True)]
    batch = collate(prompts, responses)
    with torch.no_grad():
        assert_close(response_logits(model, model, batch, boundary), torch.cat(wanted), "llama-gqa")
        assert_close(single_logits(model, batch), torch.cat(wanted), "llama-gqa")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_log_likelihood_is_the_sum_over_the_response(boundary: Boundary) -> None:
    model = frozen("llama-gqa")
    prompts, responses = rows("llama-gqa")
    wanted = [
        logits.log_softmax(-1)[torch.arange(len(response)), response].sum()
        for logits, response in zip(expected("llama-gqa"), responses, strict=True)
    ]
    found = log_likelihood(model, model, collate(prompts, responses), boundary)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=0)


def few_rows(name: str) -> tuple[list[list[int]], list[list[int]]]:
    prompts, responses = rows(name)
    return prompts[FEW], responses[FEW]


def by_hand_logits(
    prefill: Any, decode: Any, prompts: Sequence[Any], responses: Sequence[Any], boundary: Boundary
) -> torch.Tensor:
    logits = [
        by_hand(prefill, decode, prompt, response, boundary)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return torch.cat(logits)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_two_modules_are_what_a_server_would_make_of_them(name: str, boundary: Boundary) -> None:
    prefill, decode = frozen(name, seed=1), frozen(name)
    prompts, responses = few_rows(name)
    batch = collate(prompts, responses)
    with torch.no_grad():
        found = response_logits(prefill, decode, batch, boundary)
        alone = [single_logits(model, batch) for model in (prefill, decode)]
        swapped = response_logits(decode, prefill, batch, boundary)
    assert_close(found, by_hand_logits(prefill, decode, prompts, responses, boundary), name)
    for other in [*alone, swapped]:
        assert (found - other).abs().mean() > 0.5


@pytest.mark.parametrize("name", SHAPES)
def test_only_at_boundary_n_does_the_first_token_come_from_the_prefill_module(name: str) -> None:
    prefill, decode = frozen(name, seed=1), frozen(name)
    prompts, responses = few_rows(name)
    first = [0, *torch.tensor([len(response) for response in responses]).cumsum(0)[:-1].tolist()]
    batch = collate(prompts, responses)
    with torch.no_grad():
        own = single_logits(prefill, batch)[first]
        assert_close(response_logits(prefill, decode, batch, Boundary.LAST)[first], own, name)
        other = response_logits(prefill, decode, batch, Boundary.BEFORE_LAST)[first]
    assert (other - own).abs().mean() > 0.5


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_smollm2_read_by_another_module(boundary: Boundary) -> None:
    decode = frozen(SMOLLM2)
    prefill = with_adapter(decode, scale=0.02)
    prompts, responses = random_rows((2, 17, 129), (3, 8, 1), vocabulary=49152)
    with torch.no_grad():
        found = response_logits(prefill, decode, collate(prompts, responses), boundary)
        alone = single_logits(decode, collate(prompts, responses))
    assert_close(found, by_hand_logits(prefill, decode, prompts, responses, boundary), SMOLLM2)
    assert (found - alone).abs().mean() > 100 * TOLERANCE[SMOLLM2]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_an_adapter_is_its_merged_checkpoint(name: str, boundary: Boundary) -> None:
    base = frozen(name)
    adapted = with_adapter(base)
    batch = collate(*few_rows(name))
    with torch.no_grad():
        found = response_logits(adapted, base, batch, boundary)
        wanted = response_logits(merged(adapted), base, batch, boundary)
        without = response_logits(base, base, batch, boundary)
        assert_close(single_logits(adapted, batch), single_logits(merged(adapted), batch), name)
    assert_close(found, wanted, name)
    assert (found - without).abs().mean() > 0.1


def test_the_cache_is_read_in_the_decode_modules_dtype() -> None:
    prefill, decode = frozen("llama-gqa", seed=1), tiny("llama-gqa", dtype=torch.bfloat16)
    decode.requires_grad_(False)
    batch = collate(*few_rows("llama-gqa"))
    for boundary in BOUNDARIES:
        assert response_logits(prefill, decode, batch, boundary).dtype == torch.bfloat16


def refilled(batch: Batch, token: int) -> Batch:
    """The same batch with another token as padding."""
    columns = torch.arange(batch.prompts.shape[1])
    padding = columns >= batch.prompt_lengths[:, None]
    return replace(
        batch,
        prompts=batch.prompts.masked_fill(padding, token),
        responses=batch.responses.masked_fill(~batch.response_mask, token),
    )


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_what_padding_holds_does_not_matter(name: str, boundary: Boundary) -> None:
    prefill, decode = frozen(name, seed=1), frozen(name)
    batch = collate(*rows(name))
    other = refilled(batch, token=77)
    assert not torch.equal(batch.prompts, other.prompts)
    with torch.no_grad():
        found, again = (response_logits(prefill, decode, b, boundary) for b in (batch, other))
        alone, alone_again = (single_logits(decode, b) for b in (batch, other))
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    torch.testing.assert_close(alone, alone_again, rtol=0, atol=0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_what_other_rows_hold_does_not_matter(name: str, boundary: Boundary) -> None:
    prefill, decode = frozen(name, seed=1), frozen(name)
    mine, others, strangers = (
        random_rows((20, 131), (5, 9), seed=0),
        random_rows((7, 20, 140), (5, 1, 12), seed=1),
        random_rows((140, 2, 64), (12, 3, 8), seed=2),  # as wide, so that kernels do the same
    )
    tokens = sum(map(len, mine[1]))
    found = []
    for prompts, responses in (others, strangers):
        batch = collate([*mine[0], *prompts], [*mine[1], *responses])
        with torch.no_grad():
            found += [response_logits(prefill, decode, batch, boundary)[:tokens]]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_batch_knows_its_responses() -> None:
    batch = collate([[5, 6], [7, 8, 9]], [[1, 2, 3], [4]])
    assert batch.prompts.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.response_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.targets.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [([[5, 6], [7]], [[1], [2]]), ([[5, 6], []], [[1], [2]]), ([[5, 6], [7, 8]], [[1], []])],
    ids=["prompt of one token", "prompt of none", "empty response"],
)
def test_rows_with_nothing_to_hand_off_are_refused(
    prompts: list[list[int]], responses: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens and a response at least 1"):
        collate(prompts, responses)


class Spy:
    """What every call of the attention kernel was given."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor | None] = []
        self.causal: list[bool] = []
        self.queries: list[int] = []
        self._kernel = torch.nn.functional.scaled_dot_product_attention

    def __call__(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        self.masks.append(options.get("attn_mask"))
        self.causal.append(options.get("is_causal", False))
        self.queries.append(query.shape[-2])
        return self._kernel(query, key, value, **options)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", found)
    return found


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_query_is_left_without_a_key(spy: Spy, boundary: Boundary) -> None:
    prefill, decode = frozen("llama-gqa", seed=1), frozen("llama-gqa")
    prompts, responses = rows("llama-gqa")
    response_logits(prefill, decode, collate(prompts, responses), boundary)
    layers = decode.config.num_hidden_layers
    assert len(spy.masks) == 2 * layers
    # The prefill module: causal alone, so that each query has itself.
    assert spy.masks[:layers] == [None] * layers
    assert spy.causal[:layers] == [True] * layers
    # The decode module: what was written of the row, and its own tokens so far.
    handed = [len(prompt) - (boundary is Boundary.BEFORE_LAST) for prompt in prompts]
    read = max(map(len, responses)) - (boundary is Boundary.LAST)
    wanted = torch.cat(
        [
            (torch.arange(max(handed)) < torch.tensor(handed)[:, None])[:, None, None].expand(
                -1, 1, read, -1
            ),
            torch.ones(read, read, dtype=torch.bool).tril().expand(len(handed), 1, -1, -1),
        ],
        dim=-1,
    )
    for mask in spy.masks[layers:]:
        assert mask is not None
        assert mask.any(dim=-1).all()
        assert torch.equal(mask, wanted)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_finite_at_all_lengths(
    dtype: torch.dtype, boundary: Boundary
) -> None:
    prefill = tiny("llama-gqa", seed=1, dtype=dtype)
    decode = tiny("llama-gqa", dtype=dtype).requires_grad_(False)
    lengths = [2, 300, 3, 128, *range(4, 300, 37)]
    prompts, responses = random_rows(lengths, [1 + length % 30 for length in lengths])
    loss = -log_likelihood(prefill, decode, collate(prompts, responses), boundary).sum()
    torch.autograd.backward(loss)
    assert loss.isfinite()
    gradients = {
        name: weight.grad for name, weight in prefill.named_parameters() if weight.grad is not None
    }
    assert gradients
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []


def test_padding_on_the_left_leaves_queries_without_a_key(spy: Spy) -> None:
    """Why the hand-off pads on the right: what these queries give is up to the kernel.

    transformers hands such rows on. torch's own CPU kernels make them zeros, its eager attention
    the mean over all values; attention by its formula makes them NaN, below.
    """
    model = frozen("llama-gqa")
    tokens = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(tokens)
    padded[0, :12] = 0
    model(input_ids=tokens, attention_mask=padded)
    for mask in spy.masks:
        assert mask is not None
        assert mask[0, 0].any(dim=-1).tolist() == [False] * 12 + [True] * 8
        assert mask[1, 0].any(dim=-1).all()


def test_a_query_without_a_key_spoils_what_never_reads_it() -> None:
    """By attention's formula: zero weight times NaN is NaN, forwards and backwards."""
    states = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.full((4, 4), float("-inf")).triu(1)
    mask[0, 0] = float("-inf")  # padding on the left: the first query has no key
    mask[:, 0] = float("-inf")

    def attend(states: torch.Tensor) -> torch.Tensor:
        return (states @ states.T + mask).softmax(-1) @ states

    once = attend(states)
    assert once[0].isnan().all()
    assert once[1:].isfinite().all()
    assert attend(once).isnan().all()  # the next layer: real rows too
    torch.autograd.backward(once[1:].sum())  # one layer alone: a finite loss, and yet
    assert states.grad is not None
    assert states.grad.isnan().any()
