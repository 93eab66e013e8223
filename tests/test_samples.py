"""Samples: rows become chats, chats become tokens, and everything left out is counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from qsun.calibrate.definition import TextDefinition, load_definition
from qsun.calibrate.samples import Sample, SampleSet, read_sources, tokenize_sources
from tests.builders import CHAT_TEMPLATE, problems, tiny_tokenizer, write_definition, write_jsonl

SUMS = {
    "name": "sums",
    "kind": "jsonl",
    "path": "sums.jsonl",
    "prompt": "prompt",
    "response": "response",
}


def define(folder: Path, *sources: dict[str, Any], **changes: Any) -> TextDefinition:
    return load_definition(write_definition(folder / "text.yaml", *sources, **changes))


def samples(
    folder: Path,
    *sources: dict[str, Any],
    chat_template: str | None = CHAT_TEMPLATE,
    **changes: Any,
) -> SampleSet:
    definition = define(folder, *sources, **changes)
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    return tokenize_sources(read_sources(definition, folder), definition, tokenizer)


def texts(found: SampleSet) -> list[str]:
    return [str(tiny_tokenizer().decode(tokens)) for tokens in found.tokens]


def one_row(folder: Path, row: dict[str, Any], **source: Any) -> str:
    write_jsonl(folder / "one.jsonl", [row])
    source = {"name": "one", "kind": "jsonl", "path": "one.jsonl", **source}
    [text] = texts(samples(folder, source, samples=1, min_tokens=2, max_tokens=500))
    return text


def test_a_row_becomes_a_chat_by_the_models_template(tmp_path: Path) -> None:
    text = one_row(tmp_path, {"q": "How many?", "a": "One."}, prompt="q", response="a")
    assert text == (
        "<|endoftext|>"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
    )


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = one_row(tmp_path, {"chat": messages}, messages="chat")
    assert text == (
        "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_plain_text_is_no_chat(tmp_path: Path) -> None:
    assert (
        one_row(tmp_path, {"body": "Once upon a time"}, text="body")
        == "<|endoftext|>Once upon a time"
    )


def test_columns_may_be_nested_and_templates_join_them(tmp_path: Path) -> None:
    row = {"q": "How many?", "meta": {"answer": "One."}, "tools": [{"name": "count"}]}
    text = one_row(tmp_path, row, prompt="{{ q }} {{ tools | tojson }}", response="meta.answer")
    assert 'How many? [{"name": "count"}]<|im_end|>' in text
    assert "assistant\nOne.<|im_end|>" in text


def test_a_column_may_have_any_name(tmp_path: Path) -> None:
    assert "<|im_start|>user\nMe<|im_end|>" in one_row(
        tmp_path, {"self": "I", "args": "you", "q": "Me"}, prompt="{{ q }}"
    )


def test_without_a_chat_template_prompt_and_response_are_joined(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sums.jsonl", problems(1, seed=0))
    found = samples(tmp_path, SUMS, samples=1, max_tokens=500, chat_template=None)
    [row] = problems(1, seed=0)
    assert texts(found) == [f"<|endoftext|>{row['prompt']}\n\n{row['response']}"]
    assert found.chat_template == "none: prompt, blank line, response"


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
ASKED = "<|endoftext|><|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


def cut(
    folder: Path,
    row: dict[str, Any],
    template: str | None = CHAT_TEMPLATE,
    max_tokens: int = 500,
    **source: Any,
) -> tuple[str, str, Sample]:
    """A row's sample as the text before its response and the rest."""
    write_jsonl(folder / "one.jsonl", [row])
    source = {"name": "one", "kind": "jsonl", "path": "one.jsonl", **source}
    limits = {"samples": 1, "min_tokens": 2, "max_tokens": max_tokens}
    [sample] = samples(folder, source, chat_template=template, **limits).samples
    decode = tiny_tokenizer().decode
    assert sample.source == "one"
    return (
        str(decode(sample.tokens[: sample.prompt])),
        str(decode(sample.tokens[sample.prompt :])),
        sample,
    )


def test_a_chats_prompt_ends_where_the_answer_begins(tmp_path: Path) -> None:
    row = {"q": "How many?", "a": "One."}
    prompt, response, sample = cut(tmp_path, row, prompt="q", response="a")
    assert (prompt, response) == (ASKED, "One.<|im_end|>\n")
    assert sample.is_served


def test_a_prompt_without_a_chat_template_ends_behind_the_blank_line(tmp_path: Path) -> None:
    row = {"q": "How many?", "a": "One."}
    prompt, response, sample = cut(tmp_path, row, None, prompt="q", response="a")
    assert (prompt, response) == ("<|endoftext|>How many?\n\n", "One.")
    assert sample.is_served


def test_what_only_a_question_is_followed_by_is_not_of_the_prompt(tmp_path: Path) -> None:
    thinking = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert thinking != CHAT_TEMPLATE
    row = {"q": "How many?", "a": "One."}
    prompt, response, _ = cut(tmp_path, row, thinking, prompt="q", response="a")
    assert (prompt, response) == (ASKED, "One.<|im_end|>\n")


def test_a_token_across_prompt_and_response_is_of_the_response(tmp_path: Path) -> None:
    joining = Tokenizer(models.BPE())
    alphabet = [*"How many?OneT.\n"]
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    joining.train_from_iterator(["?\n\nT"] * 9, trainer)
    write_jsonl(tmp_path / "one.jsonl", [{"q": "How many?", "a": "Two."}])
    source = {"name": "one", "kind": "jsonl", "path": "one.jsonl", "prompt": "q", "response": "a"}
    definition = define(tmp_path, source, samples=1, min_tokens=2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joining)
    [sample] = tokenize_sources(read_sources(definition, tmp_path), definition, tokenizer).samples
    tokens = [str(joining.id_to_token(token)) for token in sample.tokens]
    assert "".join(tokens[: sample.prompt]) == "How many"
    assert tokens[sample.prompt] == "?\n\nT"


def test_the_prompt_of_messages_is_all_before_the_last_answer(tmp_path: Path) -> None:
    prompt, response, sample = cut(tmp_path, {"chat": CHAT}, messages="chat")
    assert prompt.endswith("<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")
    assert "assistant\nOne.<|im_end|>" in prompt
    assert response == "Yes.<|im_end|>\n"
    assert sample.is_served


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"chat": CHAT[:2]}, {"messages": "chat"}),  # a question
        ({"chat": CHAT[2:3]}, {"messages": "chat"}),  # an answer to nothing
        ({"body": "Once upon a time"}, {"text": "body"}),
        ({"q": "How many?"}, {"prompt": "q"}),
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_a_row_without_a_response_has_no_prompt(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, Any], template: str | None
) -> None:
    _, _, sample = cut(tmp_path, row, template, **columns)
    assert sample.prompt == 0
    assert not sample.is_served


def test_a_sample_that_is_cut_keeps_its_prompts_length(tmp_path: Path) -> None:
    row = {"q": "How many?", "a": "One and one and one."}
    columns: dict[str, Any] = {"prompt": "q", "response": "a"}
    _, _, whole = cut(tmp_path, row, **columns)
    for length, served in (
        (len(whole.tokens) - 1, True),
        (whole.prompt + 1, True),
        (whole.prompt, False),
        (whole.prompt - 3, False),
    ):
        _, _, sample = cut(tmp_path, row, max_tokens=length, **columns)
        assert sample.tokens == whole.tokens[:length]
        assert (sample.prompt, sample.is_served) == (whole.prompt, served)


@pytest.mark.parametrize(("prompt", "served"), [(0, False), (1, False), (2, True), (4, False)])
def test_a_prompt_of_one_token_cannot_be_handed_off(prompt: int, served: bool) -> None:
    assert Sample("one", [5, 6, 7, 8], prompt).is_served is served


def test_shares_follow_the_weights(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sums.jsonl", problems(20, seed=0))
    heavy, light = SUMS | {"name": "heavy", "weight": 2}, SUMS | {"name": "light", "weight": 1}
    found = samples(tmp_path, heavy, light, samples=10)
    assert [(count.name, count.used) for count in found.counts] == [("heavy", 7), ("light", 3)]
    assert len(found.tokens) == 10


@pytest.mark.parametrize(("count", "weights"), [(1, [1, 1, 1]), (7, [1, 2, 4]), (100, [3, 0, 1])])
def test_shares_always_sum_to_the_samples_asked_for(
    tmp_path: Path, count: int, weights: list[float]
) -> None:
    sources = [SUMS | {"weight": weight} for weight in weights]
    shares = define(tmp_path, *sources, samples=count).samples_of()
    assert sum(shares) == count
    assert all(abs(s - count * w / sum(weights)) < 1 for s, w in zip(shares, weights, strict=True))


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [{"body": "no"}] * 3 + [{"body": "word " * 90}] * 2 + [{"body": "just right, I say"}]
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    source = {"name": "mixed", "kind": "jsonl", "path": "mixed.jsonl", "text": "body"}
    found = samples(tmp_path, source, samples=3, min_tokens=4, max_tokens=20)
    [count] = found.counts
    assert count.used == 3
    assert count.truncated == 2
    assert count.rows == count.used + count.too_short
    assert sorted(map(len, found.tokens))[1:] == [20, 20]
    assert found.token_count == sum(map(len, found.tokens))


def test_the_same_seed_gives_the_same_samples_and_digest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sums.jsonl", problems(30, seed=0))
    first, again = samples(tmp_path, SUMS, seed=5), samples(tmp_path, SUMS, seed=5)
    other = samples(tmp_path, SUMS, seed=6)
    assert first == again
    assert first.digest != other.digest
    assert first.tokens != other.tokens


def test_the_digest_covers_every_token_and_where_samples_end(tmp_path: Path) -> None:
    source = {"name": "one", "kind": "jsonl", "path": "one.jsonl", "text": "body"}
    digests = set()
    for bodies in (["xq", "xqxq"], ["xqxq", "xq"], ["xq", "xqxz"]):
        write_jsonl(tmp_path / "one.jsonl", [{"body": body} for body in bodies])
        found = samples(tmp_path, source, samples=2, min_tokens=2, seed=0)
        digests.add(found.digest)
    assert len(digests) == 3


def test_a_gzip_file_is_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in problems(9, seed=0))
    (tmp_path / "sums.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    plain = write_jsonl(tmp_path / "sums.jsonl", problems(9, seed=0))
    zipped = SUMS | {"path": "sums.jsonl.gz"}
    assert samples(tmp_path, zipped).tokens == samples(tmp_path, SUMS | {"path": plain.name}).tokens


def test_a_data_set_folder_is_read_as_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", problems(9, seed=0))
    write_jsonl(tmp_path / "sums.jsonl", problems(9, seed=0))
    source = {**SUMS, "kind": "huggingface", "dataset": "./data"}
    del source["path"]
    assert samples(tmp_path, source).tokens == samples(tmp_path, SUMS).tokens


def test_answers_join_the_questions_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tiny_questions"
    package.mkdir()
    (package / "__init__.py").touch()
    write_jsonl(package / "q.jsonl", [{"id": 1, "q": "How many?"}, {"id": 2, "q": "Which?"}])
    write_jsonl(package / "a.jsonl", [{"id": 2, "a": "That."}, {"id": 1, "a": "One."}])
    monkeypatch.syspath_prepend(tmp_path)
    source = {"name": "p", "kind": "package", "package": "tiny_questions", "path": "q.jsonl"}
    columns = {"answers": "a.jsonl", "prompt": "q", "response": "a"}
    found = texts(samples(tmp_path, source | columns, samples=2))
    assert any("How many?" in text and "One." in text for text in found)
    assert any("Which?" in text and "That." in text for text in found)


def test_held_out_templates_are_never_trained_on(tmp_path: Path) -> None:
    source = {"name": "g", "kind": "generator", "dataset": "gsm_symbolic", "prompt": "question"}
    sides = []
    for side, seed in (("train", 1), ("held-out", 2)):
        definition = define(tmp_path, source | {"templates": side}, seed=seed)
        [read] = read_sources(definition, tmp_path)
        template_of = reasoning_gym.create_dataset(
            "gsm_symbolic", seed=seed, size=4096
        ).task_indices
        sides.append({template_of[row["metadata"]["source_index"]] for row in read.rows})
    train, held_out = sides
    assert len(train) > len(held_out) > 5
    assert not train & held_out
