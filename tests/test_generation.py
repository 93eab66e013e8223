"""Generation through the hand-off: what one model would say, or two by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from qsun.generation import Sampling, generate
from qsun.handoff import Boundary
from tests.builders import tiny_tokenizer
from tests.reference import (
    SHAPES,
    SMOLLM2,
    by_hand,
    frozen,
    greedy_by_hand,
    merged,
    random_rows,
    tiny,
    with_adapter,
)

BOUNDARIES = list(Boundary)
PROMPT_LENGTHS = (128, 2, 16, 300, 3, 40, 15, 17, 2, 129)
NEW_TOKENS = 24
GREEDY = Sampling(max_new_tokens=NEW_TOKENS)
# Of SmolLM2's own tokenizer; its end of a turn is token 2, as the tiny tokenizer's.
SMOLLM2_PROMPTS = {
    "a chat about France's capital": [
        *(1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198),
    ],
    "Once upon": [6403, 1980],
}


@cache
def prompts() -> list[list[int]]:
    return random_rows(PROMPT_LENGTHS, [1] * len(PROMPT_LENGTHS), seed=3)[0]


def own_words(model: Any, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """What transformers' own `generate` makes of one prompt."""
    tokens = torch.tensor([list(prompt)])
    made = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=2,
        pad_token_id=0,
    )
    words: list[int] = made[0, len(prompt) :].tolist()
    return words


@cache
def expected(name: str) -> list[list[int]]:
    return [own_words(frozen(name), prompt) for prompt in prompts()]


def ended_by(token: int) -> Any:
    """A tokenizer that takes this token for the end of a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_one_model_handing_to_itself_says_its_own_words(
    name: str, boundary: Boundary, batch_size: int
) -> None:
    model = frozen(name)
    found = generate(model, model, tiny_tokenizer(), prompts(), GREEDY, boundary, batch_size)
    assert found == expected(name)
    assert len({tuple(words) for words in found}) == len(found)  # each prompt its own


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_smollm2_says_its_own_words(boundary: Boundary) -> None:
    model = frozen(SMOLLM2)
    chosen = list(SMOLLM2_PROMPTS.values())
    found = generate(model, model, tiny_tokenizer(), chosen, GREEDY, boundary)
    assert found == [own_words(model, prompt) for prompt in chosen]
    assert found[0][-1] == 2  # "The capital of France is Paris.", and the end of the turn
    assert len(found[0]) < NEW_TOKENS == len(found[1])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_two_modules_say_what_they_would_by_hand(
    name: str, boundary: Boundary, batch_size: int
) -> None:
    prefill, decode = frozen(name, seed=1), frozen(name)
    chosen = prompts()[:6]
    found = generate(prefill, decode, tiny_tokenizer(), chosen, GREEDY, boundary, batch_size)
    by_hand = [greedy_by_hand(prefill, decode, prompt, NEW_TOKENS, boundary) for prompt in chosen]
    assert found == by_hand
    for model in (prefill, decode):
        assert found != generate(model, model, tiny_tokenizer(), chosen, GREEDY, boundary)
    assert found != generate(decode, prefill, tiny_tokenizer(), chosen, GREEDY, boundary)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_adapter_says_what_its_merged_checkpoint_says(boundary: Boundary) -> None:
    base = frozen("llama-gqa")
    adapted = with_adapter(base, scale=0.2)
    found, wanted, without = (
        generate(prefill, base, tiny_tokenizer(), prompts(), GREEDY, boundary)
        for prefill in (adapted, merged(adapted), base)
    )
    assert found == wanted
    assert found != without


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_only_at_boundary_n_does_the_first_token_come_from_the_prefill_module(
    new_tokens: int,
) -> None:
    favourite = 99
    prefill = tiny("llama-gqa", seed=1, tied=False).requires_grad_(False)
    prefill.lm_head.weight.zero_()
    prefill.lm_head.weight[favourite] = 1000 * prefill.model.norm.weight.sign()
    states = prefill.model(torch.tensor(prompts()[:1])).last_hidden_state[0, -1]
    prefill.lm_head.weight[favourite] = states  # likes what it sees, and nothing else
    decode = frozen("llama-gqa")
    sampling = Sampling(max_new_tokens=new_tokens)
    found = {
        boundary: generate(prefill, decode, tiny_tokenizer(), prompts()[:1], sampling, boundary)[0]
        for boundary in BOUNDARIES
    }
    assert found[Boundary.LAST][0] == favourite
    assert favourite not in found[Boundary.LAST][1:]
    assert favourite not in found[Boundary.BEFORE_LAST]
    assert {len(words) for words in found.values()} == {new_tokens}


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_response_ends_with_the_end_of_its_turn(boundary: Boundary, batch_size: int) -> None:
    model = frozen("llama-gqa")
    end = expected("llama-gqa")[0][5]
    wanted = [
        words[: words.index(end) + 1] if end in words else words for words in expected("llama-gqa")
    ]
    assert len({len(words) for words in wanted}) > 1
    found = generate(model, model, ended_by(end), prompts(), GREEDY, boundary, batch_size)
    assert found == wanted


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_first_token_may_be_the_end(boundary: Boundary, batch_size: int) -> None:
    model = frozen("llama-gqa")
    end = expected("llama-gqa")[2][0]
    found = generate(model, model, ended_by(end), prompts(), GREEDY, boundary, batch_size)
    assert found[2] == [end]


@pytest.mark.parametrize("declared", ["one", "several"])
def test_the_models_own_ends_count_too(declared: str) -> None:
    model = tiny("llama-gqa").requires_grad_(False)
    end = expected("llama-gqa")[0][5]
    model.generation_config.eos_token_id = end if declared == "one" else [511, end]
    found = generate(model, model, tiny_tokenizer(), prompts()[:1], GREEDY)
    assert found == [expected("llama-gqa")[0][: expected("llama-gqa")[0].index(end) + 1]]


def stop_word() -> tuple[int, str, list[str]]:
    """A row whose response has a piece of text that no other has: row, text, all responses."""
    texts = tiny_tokenizer().batch_decode(expected("llama-gqa"))
    for row, words in enumerate(expected("llama-gqa")):
        for token in words[5:12]:
            piece = tiny_tokenizer().decode([token])
            alone = [text for text in texts if piece in text] == [texts[row]]
            if len(piece) > 2 and piece.isascii() and alone:
                return row, piece, texts
    raise AssertionError("no response has a piece of its own")


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_response_ends_after_a_stop_string(boundary: Boundary, batch_size: int) -> None:
    model = frozen("llama-gqa")
    row, stop, texts = stop_word()
    sampling = replace(GREEDY, stop=(stop,))
    found = generate(model, model, tiny_tokenizer(), prompts(), sampling, boundary, batch_size)
    assert tiny_tokenizer().decode(found[row]) == texts[row][: texts[row].index(stop) + len(stop)]
    assert [*found[:row], *found[row + 1 :]] == [
        words for other, words in enumerate(expected("llama-gqa")) if other != row
    ]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_nothing_follows_a_stop_string_where_padding_is_no_end(boundary: Boundary) -> None:
    model = frozen("llama-gqa")
    row, stop, texts = stop_word()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None  # as Llama 3's: row by row, the batch is padded with token 0
    found = generate(model, model, tokenizer, prompts(), replace(GREEDY, stop=(stop,)), boundary)
    assert tokenizer.decode(found[row]) == texts[row][: texts[row].index(stop) + len(stop)]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_stop_string_of_the_first_token_stops(boundary: Boundary) -> None:
    model = frozen("llama-gqa")
    row = 0
    first = expected("llama-gqa")[row][0]
    stop = tiny_tokenizer().decode([first])
    assert stop.isascii()
    sampling = replace(GREEDY, stop=(stop,))
    found = generate(model, model, tiny_tokenizer(), prompts()[row : row + 1], sampling, boundary)
    assert found == [[first]]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_stop_string_that_begins_in_the_prompt_does_not_stop(boundary: Boundary) -> None:
    model = frozen("llama-gqa")
    tokenizer = tiny_tokenizer()
    for prompt, words in zip(prompts(), expected("llama-gqa"), strict=True):
        stop = tokenizer.decode([prompt[-1], words[0]])
        if not stop.isascii() or stop in tokenizer.decode(words):
            continue
        sampling = replace(GREEDY, stop=(stop,))
        assert generate(model, model, tokenizer, [prompt], sampling, boundary) == [words]
        break
    else:
        raise AssertionError("no prompt and response make readable text together")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_one_new_token(boundary: Boundary) -> None:
    model = frozen("llama-gqa")
    sampling = Sampling(max_new_tokens=1)
    found = generate(model, model, tiny_tokenizer(), prompts(), sampling, boundary)
    assert found == [words[:1] for words in expected("llama-gqa")]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_seed_gives_the_same_draws_and_leaves_the_others_alone(boundary: Boundary) -> None:
    prefill, decode = frozen("llama-gqa", seed=1), frozen("llama-gqa")
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=5)

    def drawn(sampling: Sampling) -> list[list[int]]:
        return generate(prefill, decode, tiny_tokenizer(), prompts(), sampling, boundary)

    torch.manual_seed(11)
    random.seed(11)
    before = torch.random.get_rng_state(), random.getstate()
    first = drawn(sampling)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(12)
    assert drawn(sampling) == first
    other = drawn(replace(sampling, seed=6))
    assert sum(a != b for a, b in zip(first, other, strict=True)) > len(first) // 2
    # Every token is drawn, the first too: it differs with the seed.
    assert [words[0] for words in first] != [words[0] for words in other]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("settings", [{"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}])
def test_the_coldest_draws_are_greedy(boundary: Boundary, settings: dict[str, float]) -> None:
    model = frozen("llama-gqa")
    sampling = replace(GREEDY, **settings)  # type: ignore[arg-type]
    found = generate(model, model, tiny_tokenizer(), prompts(), sampling, boundary)
    assert found == expected("llama-gqa")


def test_draws_follow_the_models_probabilities() -> None:
    prefill, decode = frozen("llama-gqa", seed=1), frozen("llama-gqa")
    prompt = prompts()[2]
    for boundary in BOUNDARIES:
        sampling = Sampling(max_new_tokens=1, temperature=0.5)
        drawn = generate(
            prefill, decode, tiny_tokenizer(), [prompt] * 1000, sampling, boundary, 1000
        )
        first = greedy_by_hand(prefill, decode, prompt, 1, boundary)
        share = sum(words == first for words in drawn) / len(drawn)
        assert share == pytest.approx(probability(prefill, decode, prompt, boundary), abs=0.05)


def probability(prefill: Any, decode: Any, prompt: Sequence[int], boundary: Boundary) -> float:
    """Of the likeliest first token, at temperature 0.5."""
    logits = by_hand(prefill, decode, prompt, [0], boundary)[0]
    return float((logits / 0.5).softmax(-1).max())


def test_a_prompt_of_one_token_is_refused() -> None:
    model = frozen("llama-gqa")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        generate(model, model, tiny_tokenizer(), [[5, 6], [7]], GREEDY)


def test_no_prompts_no_responses() -> None:
    model = frozen("llama-gqa")
    assert generate(model, model, tiny_tokenizer(), [], GREEDY) == []
