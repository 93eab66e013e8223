"""Prompts: what a client sent, as tokens. The only place where a served prompt is tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsun.serve.refusals import bad_request
from qsun.serve.requests import ChatRequest, CompletionRequest, Message, Tool

_PROBE = [{"role": "user", "content": "?"}]
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "parameters": {}}}


class Prompts:
    """The bundle's tokenizer and chat template. `vocabulary` is how many token ids there are."""

    def __init__(self, tokenizer: Path, vocabulary: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._vocabulary = vocabulary
        self.takes_chats = self._tokenizer.chat_template is not None
        self.takes_tools = self.takes_chats and self._shows_tools()

    def completion(self, request: CompletionRequest) -> list[int]:
        """The tokens of a completion's prompt.

        Raises:
            Refusal: token ids that the model does not have.
        """
        if isinstance(request.prompt, str):
            return list(self._tokenizer(request.prompt).input_ids)
        unknown = [token for token in request.prompt if token >= self._vocabulary]
        if unknown:
            message = f"token ids {unknown[:5]}: the model has {self._vocabulary} of them"
            raise bad_request("invalid_token", message, "prompt")
        return request.prompt

    def chat(self, request: ChatRequest) -> list[int]:
        """The tokens of a chat, up to where the answer begins.

        Raises:
            Refusal: no chat template, one that refuses the messages, or has no place for tools.
        """
        if not self.takes_chats:
            message = "this bundle's tokenizer has no chat template: use /v1/completions"
            raise bad_request("no_chat_template", message, "messages")
        tools = request.tools if request.tool_choice != "none" else None
        if tools and not self.takes_tools:
            message = (
                "this bundle's chat template has no place for tools: put the functions into a "
                "message, in the form that the task was tuned on"
            )
            raise bad_request("no_tools", message, "tools")
        try:
            text = self._text(request.messages, tools)
        except Exception as error:  # what a template raises is its author's choice
            message = f"the chat template refuses these messages: {error}"
            raise bad_request("chat_template", message, "messages") from error
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [self._plain(message) for message in messages],
                tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    def _plain(self, message: Message) -> dict[str, Any]:
        value = message.plain()
        # OpenAI's newer name for the same thing: templates that lack it drop such messages.
        if message.role == "developer" and "developer" not in str(self._tokenizer.chat_template):
            value["role"] = "system"
        return value

    def _shows_tools(self) -> bool:
        """Whether the template does anything with tools: many leave them out without a word."""

        def shown(tools: list[dict[str, Any]] | None) -> str | None:
            try:
                return str(
                    self._tokenizer.apply_chat_template(
                        _PROBE, tools=tools, tokenize=False, add_generation_prompt=True
                    )
                )
            except Exception:  # what a template raises is its author's choice
                return None

        return shown([_PROBE_TOOL]) != shown(None)
