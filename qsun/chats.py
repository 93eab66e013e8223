"""Chats: a row's columns become messages, messages become tokens by the model's own template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from qsun.calls import canonical_calls, json_text
from qsun.errors import DataError
from qsun.rows import Row
from qsun.sources import SourceDefinition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
SHOWN_CHARACTERS = 60  # of a value that is refused


PLAIN_SEPARATOR = "\n\n"  # between prompt and response where the model has no chat template


def encode_row(row: Row, source: SourceDefinition, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens of a row: its text, or its chat with prompt and response."""
    if source.text is not None:
        return list(tokenizer(column_text(row, source.text, source)).input_ids)
    messages = row_messages(row, source)
    if tokenizer.chat_template is None:
        text = PLAIN_SEPARATOR.join(message["content"] for message in messages)
        return list(tokenizer(text).input_ids)
    text = _chat(messages, source, tokenizer, asks=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def encode_prompts(
    prompts: Sequence[tuple[list[Message], SourceDefinition]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens after which the model's answer begins, for each prompt of a source."""
    texts = prompt_texts(prompts, tokenizer)
    whole = tokenizer.chat_template is None
    return _tokens(tokenizer(texts, add_special_tokens=whole).input_ids)


def prompt_texts(
    prompts: Sequence[tuple[list[Message], SourceDefinition]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The texts after which the model's answer begins; a template's special tokens included."""
    if tokenizer.chat_template is None:
        return [
            PLAIN_SEPARATOR.join([*(message["content"] for message in messages), ""])
            for messages, _ in prompts
        ]
    return [_chat(messages, source, tokenizer, asks=True) for messages, source in prompts]


def encode_responses(
    responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens of answers, each ended by the token that ends a turn."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = _tokens(tokenizer(list(responses), add_special_tokens=False).input_ids)
    return [tokens + end for tokens in found]


def _tokens(rows: Any) -> list[list[int]]:
    return [list(row) for row in rows]


def _chat(
    messages: list[Message],
    source: SourceDefinition,
    tokenizer: PreTrainedTokenizerBase,
    asks: bool,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"source {source.name}: the model's chat template refuses a row with the roles "
            f"{roles}: {error}"
        ) from error


def row_messages(row: Row, source: SourceDefinition) -> list[Message]:
    """The chat that a row stands for; plain text is one user message.

    Raises:
        DataError: a named column is not in the row, which lists the row's columns; or it
            holds something else than text or messages.
    """
    if source.messages is not None:
        value = _lookup(row, source.messages, source)
        if not isinstance(value, list) or not all(map(_is_message, value)):
            raise DataError(
                f"source {source.name}: column {source.messages!r} must hold a list of messages "
                f"with role and content, both text; a row has {_beginning(value)}"
            )
        return value
    prompt = column_text(row, source.prompt or source.text or "", source)
    messages = [{"role": "user", "content": prompt}]
    if source.response is not None:
        messages.append({"role": "assistant", "content": column_text(row, source.response, source)})
    return messages


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("role", "content")
    )


def _beginning(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def column_text(row: Row, spec: str, source: SourceDefinition) -> str:
    """What `spec`, a column's path or a template over the columns, gives for a row."""
    if "{{" in spec:
        return _render(row, spec, source)
    value = _lookup(row, spec, source)
    if not isinstance(value, str):
        raise DataError(
            f"source {source.name}: column {spec!r} holds {type(value).__name__}, not text: "
            f"a row has {_beginning(value)}"
        )
    return value


def _lookup(row: Row, path: str, source: SourceDefinition) -> Any:
    value: Any = row
    for step in path.split("."):
        if not isinstance(value, dict) or step not in value:
            raise DataError(
                f"source {source.name}: there is no column {path!r}; "
                f"its columns are {', '.join(row)}"
            )
        value = value[step]
    return value


def _render(row: Row, template: str, source: SourceDefinition) -> str:
    try:
        return str(_template(template).render(row))
    except Exception as error:  # whatever an expression of the user's raises, by design
        raise DataError(
            f"source {source.name}: template {template!r}: {error or type(error).__name__}; "
            f"its columns are {', '.join(row)}"
        ) from error


@cache
def _template(text: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    environment.filters |= {"calls": canonical_calls, "json": json_text}
    return environment.from_string(text)
