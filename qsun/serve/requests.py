"""What clients may ask: OpenAI's completions and chat completions, field by field.

A field that qsun does not know is refused, not ignored: an answer must be to what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    model_validator,
)

INT64 = 2**63
Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100)]
# Python's and pydantic's `\d` also take digits of other scripts.
BiasedToken = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Biases = Annotated[
    dict[BiasedToken, Bias],
    Field(max_length=300, json_schema_extra={"additionalProperties": False}),
]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]

# Fields that other servers know and that would be wrong here, with the reason.
REFUSED = {
    "kv_transfer_params": "the router alone says where a cache lies",
    "ec_transfer_params": "the router alone says where a cache lies",
    "cache_salt": "the router alone keeps tasks' caches apart",
    "prompt_logprobs": "the prompt is read by the prefill module: its log-probabilities are not "
    "the decode module's",
    "echo": "the prompt is read by the prefill module and not repeated",
    "suffix": "prefill modules read from left to right",
    "best_of": "one answer a request",
}


def given(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: what is null or an empty list is as if it was not there."""
    return {key: entry for key, entry in value.items() if entry is not None and entry != []}


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False


class Sampling(BaseModel):
    """How an answer is sampled; what is not given is as the decode module's checkpoint says."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Text = Field(description="The task.")
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    temperature: StrictFloat | None = Field(None, ge=0, le=2)
    top_p: StrictFloat | None = Field(None, gt=0, le=1)
    top_k: StrictInt | None = Field(None, ge=0, le=INT64 - 1)
    min_p: StrictFloat | None = Field(None, ge=0, le=1)
    seed: StrictInt | None = Field(None, ge=-INT64, le=INT64 - 1)
    stop: Stop | Annotated[list[Text], Field(max_length=256)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    presence_penalty: StrictFloat | None = Field(None, ge=-2, le=2)
    frequency_penalty: StrictFloat | None = Field(None, ge=-2, le=2)
    repetition_penalty: StrictFloat | None = Field(None, gt=0, le=10)
    logit_bias: Biases | None = None
    min_tokens: StrictInt | None = Field(None, ge=0)
    ignore_eos: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    return_token_ids: StrictBool = Field(False, description="Also give the answer's token ids.")
    n: StrictInt | None = Field(None, ge=1, le=1, description="One answer a request.")
    user: str | None = Field(None, description="Taken, and not used.")
    metadata: dict[str, str] | None = Field(None, description="Taken, and not used.")

    def sampling(self) -> dict[str, Any]:
        """The fields that the decode worker is told, as given."""
        return self.model_dump(include=_PASSED_ON, exclude_none=True)


_PASSED_ON = {
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("min_tokens", "ignore_eos", "skip_special_tokens"),
}


class CompletionRequest(Sampling):
    """`POST /v1/completions`: one prompt, as text or as token ids."""

    prompt: Text | Annotated[list[TokenId], Field(min_length=1)]
    max_tokens: StrictInt = Field(16, ge=1)
    logprobs: StrictInt | None = Field(None, ge=0, le=20)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    arguments: str


class ToolCall(BaseModel):
    """A call in an earlier answer."""

    model_config = ConfigDict(extra="forbid")

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        # Clients send an answer's message back with every field they know, most of them null.
        return given(value) if isinstance(value, dict) else value

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: content as one text, a call's arguments as values."""
        value = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            value["content"] = "".join(part.text for part in self.content)
        value.setdefault("content", "")
        for call in value.get("tool_calls", ()):
            call["function"]["arguments"] = _values(call["function"]["arguments"])
        return value


def _values(arguments: str) -> Any:
    """What JSON text says; text that is none stays text."""
    try:
        return orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        return arguments


class Function(BaseModel):
    """A function that may be called; `parameters` is its JSON schema."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    """A tool that may be used."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`: messages, put together by the base model's chat template."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: StrictInt | None = Field(None, ge=1, description="The older name.")
    max_completion_tokens: StrictInt | None = Field(
        None, ge=1, description="Without either, as many as the context still holds."
    )
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
