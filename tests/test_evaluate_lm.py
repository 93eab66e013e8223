"""lm-eval through two modules: with P = D it is lm-eval's own class, else what two modules say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qsun.errors import DataError
from qsun.evaluate.lm import TwoModules
from qsun.evaluate.pair import Pair, prefill_is_idle, shared_prefix
from qsun.handoff import Boundary
from qsun.models import load_model, load_tokenizer
from tests.builders import tiny_tokenizer
from tests.lm_eval_tasks import TASKS, asked, hurried, local_task, numbers_in
from tests.reference import by_hand, frozen, greedy_by_hand, with_adapter

NATS = 1e-3  # of a whole answer or text, in float32
PRELUDE = "Ada has 12 apples and is given 30 more. " * 3


@pytest.fixture(autouse=True, scope="module")
def _hurried() -> Iterator[None]:
    with hurried():
        yield


@pytest.fixture(scope="module")
def real(smollm2_base: Path) -> Pair:
    """SmolLM2 as both modules, float32."""
    model = load_model(smollm2_base, "float32")
    return Pair(model, model, load_tokenizer(smollm2_base), Boundary.BEFORE_LAST, 512)


def tiny_pair(boundary: Boundary = Boundary.BEFORE_LAST, *, one: bool = True) -> Pair:
    decode = frozen("llama-gqa")
    prefill = decode if one else with_adapter(decode, seed=3, scale=0.5)
    return Pair(prefill, decode, tiny_tokenizer(), boundary, 256)


def with_room(pair: Pair, max_tokens: int) -> Pair:
    return Pair(pair.prefill, pair.decode, pair.tokenizer, pair.boundary, max_tokens)


def lm_evals_own(pair: Pair, batch_size: int) -> HFLM:
    return HFLM(
        pretrained=pair.decode,
        tokenizer=pair.tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=pair.max_tokens,
    )


def agree(
    pair: Pair, task: dict[str, Any], limit: int | None = None, batch_size: int = 2, **options: Any
) -> TwoModules:
    """Both classes on one task; gives ours."""
    ours = TwoModules(pair, batch_size, **options)
    scores, responses = asked(ours, task, limit)
    expected, theirs = asked(lm_evals_own(pair, batch_size), task, limit)
    assert scores == pytest.approx(expected, rel=1e-4)
    assert scores
    if task["output_type"] == "generate_until":
        assert responses == theirs
    else:
        assert numbers_in(responses) == pytest.approx(numbers_in(theirs), abs=NATS)
        assert numbers_in(theirs)
    return ours


def requests(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance("", {}, one, index) for index, one in enumerate(arguments)]


def sampled(lm: Any, contexts: Sequence[str], **options: Any) -> list[str]:
    chosen = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, **options}
    found: list[str] = lm.generate_until(requests(*((one, chosen) for one in contexts)), True)
    return found


@pytest.mark.parametrize("output_type", ["multiple_choice", "generate_until"])
def test_few_shot_prompts_of_smollm2_score_as_lm_evals_own_class_does(
    real: Pair, output_type: str
) -> None:
    ours = agree(real, local_task(output_type), limit=3, batch_size=2)
    assert output_type == "generate_until" or ours.prefixes.reused > 0


def test_stop_strings_end_smollm2s_answers_where_lm_evals_own_class_ends_them(real: Pair) -> None:
    free = {"until": [], "max_gen_toks": 12, "do_sample": False}
    opening = {"doc_to_text": "The capital of {{country}} is", "num_fewshot": 0}
    task = local_task("generate_until", **opening, generation_kwargs=free)
    _, whole = asked(TwoModules(real, 3), task, 3)
    texts = [str(one[0][0]) for one in whole]
    word = texts[0].split()[2]
    stopping = task | {"generation_kwargs": free | {"until": [word]}}
    agree(real, stopping, limit=3, batch_size=3)
    _, cut = asked(TwoModules(real, 3), stopping, 3)
    assert [str(one[0][0]) for one in cut] == [text.split(word)[0] for text in texts]


@pytest.mark.parametrize("max_tokens", [512, 12])
def test_log_likelihoods_of_smollm2_are_lm_evals_own_also_where_a_prompt_is_cut(
    real: Pair, max_tokens: int
) -> None:
    agree(with_room(real, max_tokens), local_task("loglikelihood"), limit=3, batch_size=3)


@pytest.mark.parametrize("max_tokens", [512, 48])
def test_whole_texts_of_smollm2_score_the_same_however_they_are_cut(
    real: Pair, max_tokens: int
) -> None:
    task = local_task("loglikelihood_rolling")
    agree(with_room(real, max_tokens), task, limit=2, batch_size=4, rolling_tokens=24)


@pytest.mark.parametrize(("rolling_tokens", "max_tokens"), [(1, 64), (7, 64), (64, 64), (500, 64)])
def test_whole_texts_score_the_same_in_pieces_of_any_length(
    rolling_tokens: int, max_tokens: int
) -> None:
    pair = with_room(tiny_pair(), max_tokens)
    agree(pair, local_task("loglikelihood_rolling"), limit=1, rolling_tokens=rolling_tokens)


@pytest.mark.parametrize("boundary", list(Boundary))
@pytest.mark.parametrize("output_type", list(TASKS))
def test_a_tiny_model_as_both_modules_is_lm_evals_own_at_both_boundaries(
    output_type: str, boundary: Boundary
) -> None:
    agree(tiny_pair(boundary), local_task(output_type), limit=3, rolling_tokens=40)


@pytest.mark.parametrize("boundary", list(Boundary))
@pytest.mark.parametrize("output_type", list(TASKS))
def test_a_shared_prefix_read_once_changes_nothing(output_type: str, boundary: Boundary) -> None:
    pair, task = tiny_pair(boundary, one=False), local_task(output_type, description=PRELUDE)
    once, each = (TwoModules(pair, 2, rolling_tokens=40) for _ in range(2))
    each.prefixes.of = lambda prompts: None  # type: ignore[method-assign]
    _, shared = asked(once, task, 3)
    _, alone = asked(each, task, 3)
    assert once.prefixes.reused > 0
    assert each.prefixes.reused == 0
    assert numbers_in(shared) == pytest.approx(numbers_in(alone), abs=NATS)
    assert output_type != "generate_until" or shared == alone


@pytest.mark.parametrize("boundary", list(Boundary))
def test_two_modules_score_and_answer_as_they_do_token_by_token(boundary: Boundary) -> None:
    pair = tiny_pair(boundary, one=False)
    lm = TwoModules(pair, 4)
    contexts = ["How many apples are there?", "Ada has 12 books and", "Bert is given 3 more eggs"]
    answers = [" There are 42 apples.", " 30 cards", "!"]
    found = lm.loglikelihood(requests(*zip(contexts, answers, strict=True)), True)
    for context, answer, (value, _) in zip(contexts, answers, found, strict=True):
        prompt, response = lm._encode_pair(context, answer)
        logits = by_hand(pair.prefill, pair.decode, prompt, response, boundary)
        scores = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])
        assert value == pytest.approx(float(scores.sum()), abs=NATS)
    made = sampled(lm, contexts, do_sample=False, temperature=0.0)
    for context, text in zip(contexts, made, strict=True):
        tokens = greedy_by_hand(pair.prefill, pair.decode, lm.tok_encode(context), 8, boundary)
        assert text == pair.tokenizer.decode(tokens, skip_special_tokens=True)
        length = lm.length_of(context)
        assert length is not None
        assert (length.tokens, length.ended) == (8, False)


def test_greedy_is_said_of_the_answer_that_two_modules_would_give() -> None:
    pair = tiny_pair(one=False)
    lm = TwoModules(pair, 4)
    context = lm.tok_encode("How many apples are there?")
    made = greedy_by_hand(pair.prefill, pair.decode, context, 4)
    other = [*made[:3], (made[3] + 1) % 500]
    found = lm._loglikelihood_tokens([(("a", "b"), context, made), (("a", "c"), context, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_drawn_answers_are_the_same_for_a_seed_whatever_was_asked_before() -> None:
    pair, contexts = tiny_pair(), [f"Ada has {count} apples" for count in range(5)]
    lm = TwoModules(pair, 2, seed=7)
    first = sampled(lm, contexts)
    assert sampled(lm, contexts) == first
    assert sampled(TwoModules(pair, 2, seed=7), contexts) == first
    assert sampled(TwoModules(pair, 2, seed=8), contexts) != first
    assert sampled(lm, contexts, do_sample=False, temperature=0.0) != first


def test_batches_of_one_evaluation_draw_differently() -> None:
    lm = TwoModules(tiny_pair(), 1, seed=7)
    assert len(set(sampled(lm, ["Ada has 3 apples"] * 4))) > 1


def test_a_context_that_leaves_nothing_to_hand_off_is_refused() -> None:
    lm = TwoModules(tiny_pair(), 2)
    with pytest.raises(DataError, match="1 contexts have under 2 tokens, which leaves the prefill"):
        lm.loglikelihood(requests(("", " a"), ("How many", " a")), True)
    with pytest.raises(DataError, match="a prompt has under 2 tokens"):
        sampled(lm, [pair_start(lm)])


def pair_start(lm: Any) -> str:
    return str(lm.tokenizer.bos_token)


def test_a_generation_option_that_nothing_reads_is_refused() -> None:
    with pytest.raises(DataError, match="knows no num_beams"):
        sampled(TwoModules(tiny_pair(), 2), ["How many apples?"], num_beams=4)


@pytest.mark.parametrize(
    ("make", "idle"),
    [
        (lambda decode: decode, True),
        (lambda decode: with_adapter(decode, scale=0.0), True),
        (lambda decode: with_adapter(decode, scale=0.5), False),
        (lambda _: frozen("llama-gqa", 1), False),
    ],
)
def test_a_prefill_module_that_does_nothing_is_told(make: Callable[[Any], Any], idle: bool) -> None:
    decode = frozen("llama-gqa")
    pair = Pair(make(decode), decode, tiny_tokenizer(), Boundary.BEFORE_LAST, 256)
    assert prefill_is_idle(pair) is idle


def test_a_shared_prefix_ends_before_any_prompt_does() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 5]], shortest=2) == [1, 2]
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 9, 4]], shortest=3) == []
    assert shared_prefix([[1, 2, 3, 4]], shortest=2) == []


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused() -> None:
    lm = TwoModules(with_room(tiny_pair(), 24))
    room = 24 - len(lm.tok_encode("a b c"))
    asked_for = [("a b c", room), ("a b c", room + 1), ("a b c " * 20, 1)]
    fits, *others = requests(*((text, {"max_gen_toks": tokens}) for text, tokens in asked_for))
    assert len(lm.generate_until([fits], True)) == 1
    with pytest.raises(DataError, match="2 of 3 prompts leave no room"):
        lm.generate_until([fits, *others], True)
