"""From a client to two real modules and back: `qsun serve`, and the `openai` package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from qsun.bundle import Bundle
from qsun.models import load_tokenizer
from qsun.references import Reference, read_references
from qsun.verify.served.in_process import InProcess
from tests.served.conftest import TASKS, TIE_NATS
from tests.serving import Serving

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def client(served: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none needed", max_retries=0) as client:
        yield client


def references(bundle: Bundle, task: str) -> list[Reference]:
    vocabulary = bundle.manifest.kv_layout["vocabulary"]
    return read_references(bundle.folder / f"verification/{task}.jsonl", vocabulary)


def ask(client: OpenAI, task: str, prompt: list[int], stream: bool) -> tuple[list[int], str]:
    """Tokens and text of a greedy answer."""
    more = {"return_token_ids": True, "ignore_eos": True}
    if not stream:
        answer = client.completions.create(
            model=task, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, extra_body=more
        )
        assert (answer.model, answer.choices[0].finish_reason) == (task, "length")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == NEW_TOKENS
        return answer.choices[0].model_extra["token_ids"], answer.choices[0].text  # type: ignore[index]
    tokens, text, endings = [], "", []
    for chunk in client.completions.create(
        model=task,
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body=more,
        stream=True,
    ):
        assert chunk.model == task
        choice = chunk.choices[0]
        tokens += choice.model_extra["token_ids"]  # type: ignore[index]
        text += choice.text
        endings.append(choice.finish_reason)
    assert endings[-1] == "length"
    assert set(endings[:-1]) == {None}
    return tokens, text


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_the_two_modules_in_this_process(
    client: OpenAI, in_process: InProcess, bundle: Bundle, task: str
) -> None:
    tokenizer = load_tokenizer(bundle.tokenizer)
    same = 0
    asked = references(bundle, task)
    for reference in asked:
        whole, text = ask(client, task, reference.prompt, stream=False)
        streamed = ask(client, task, reference.prompt, stream=True)
        assert text == tokenizer.decode(whole, skip_special_tokens=True)
        assert streamed[1] == tokenizer.decode(streamed[0], skip_special_tokens=True)
        gaps = in_process.score(task, reference.prompt, whole).gaps
        assert len(gaps) == NEW_TOKENS
        assert max(gaps) <= TIE_NATS
        same += max(gaps) == 0 and streamed[0] == whole
    assert same >= len(asked) / 2


def test_tasks_are_told_apart(client: OpenAI, bundle: Bundle) -> None:
    prompt = references(bundle, "tools")[0].prompt
    answers = {task: ask(client, task, prompt, stream=False)[1] for task in TASKS}
    assert answers["math"] != answers["tools"]


def test_a_chat_and_its_stop_string(client: OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many?"}]
    answer = client.chat.completions.create(
        model="math",
        messages=question,
        max_tokens=24,
        temperature=0,
    )
    text = answer.choices[0].message.content
    assert text
    assert answer.choices[0].message.role == "assistant"
    word = text.split()[3]
    cut = client.chat.completions.create(
        model="math",
        messages=question,
        max_tokens=24,
        temperature=0,
        stop=[word],
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == text[: text.index(word)]
    streamed: Any = client.chat.completions.create(
        model="math",
        messages=question,
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    assert "".join(one.choices[0].delta.content or "" for one in streamed) == text


def test_a_sampled_answer_is_the_same_for_the_same_seed(client: OpenAI) -> None:
    def drawn(seed: int) -> str:
        answer = client.completions.create(
            model="math", prompt="Once upon a time", max_tokens=12, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_log_probabilities_come_with_every_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="math",
        messages=[{"role": "user", "content": "Two plus two?"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert len(scores.content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for token in scores.content:
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob == max(one.logprob for one in token.top_logprobs)


def test_the_longest_prompt_is_served_and_a_longer_one_refused(
    client: OpenAI, bundle: Bundle
) -> None:
    longest = bundle.manifest.max_tokens
    words = references(bundle, "math")[0].prompt * 40
    assert len(ask(client, "math", words[: longest - NEW_TOKENS], stream=False)[0]) == NEW_TOKENS
    with pytest.raises(BadRequestError, match=f"together at most {longest}"):
        ask(client, "math", words[: longest - NEW_TOKENS + 1], stream=False)


def test_a_request_that_vllm_refuses_is_the_clients_fault(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"(?i)logit_bias|vocab"):
        client.completions.create(
            model="math", prompt="Hello there", extra_body={"logit_bias": {"999999": 1}}
        )


def test_an_unknown_task_is_told_the_known_ones(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="there are math, tools"):
        client.completions.create(model="maths", prompt="Hello there")


def test_models_are_the_tasks(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == list(TASKS)
