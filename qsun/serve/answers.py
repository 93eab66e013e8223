"""Answers in OpenAI's words: pieces of text become completions or chats, whole or as a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import orjson

from qsun.serve.asked import Asked, Piece
from qsun.serve.requests import ChatRequest, CompletionRequest
from qsun.serve.tool_calls import may_be_call, parse_calls

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class Form(ABC):
    """How one request's answer is put. `model` is the task in every object, never a worker's."""

    def __init__(self, asked: Asked, wants_ids: bool, wants_usage: bool) -> None:
        self._asked, self._wants_ids, self._wants_usage = asked, wants_ids, wants_usage
        self._created = int(time.time())
        self._generated = 0

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The answer as one object."""
        choice = self._choice(pieces) | {"index": 0}
        if self._wants_ids:
            choice["token_ids"] = [token for piece in pieces for token in piece.token_ids]
        self._generated = sum(len(piece.token_ids) for piece in pieces)
        return {**self._head(stream=False), "choices": [choice], "usage": self._usage()}

    def events(self, piece: Piece) -> Iterator[bytes]:
        """What a client is sent for a piece, as it comes."""
        self._generated += len(piece.token_ids)
        for place, part in enumerate(self._parts(piece)):
            if self._wants_ids:
                part = {**part, "token_ids": piece.token_ids if place == 0 else []}
            yield self._before_choice + orjson.dumps(part) + b"]}\n\n"

    def ending(self) -> Iterator[bytes]:
        """What a client is sent after the last piece."""
        if self._wants_usage:
            yield event({**self._head(stream=True), "choices": [], "usage": self._usage()})
        yield DONE

    @cached_property
    def _before_choice(self) -> bytes:
        """An event up to its choice: the same in all events of an answer, so written once."""
        return event({**self._head(stream=True), "choices": []}).removesuffix(b"]}\n\n")

    @abstractmethod
    def _choice(self, pieces: Sequence[Piece]) -> Json: ...

    @abstractmethod
    def _parts(self, piece: Piece) -> Iterator[Json]: ...

    @abstractmethod
    def _head(self, stream: bool) -> Json: ...

    def _usage(self) -> Json:
        prompt = len(self._asked.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }


class CompletionForm(Form):
    """`text_completion` objects."""

    def __init__(self, asked: Asked, request: CompletionRequest) -> None:
        options = request.stream_options
        super().__init__(asked, request.return_token_ids, bool(options and options.include_usage))

    def _head(self, stream: bool) -> Json:
        return {
            "id": f"cmpl-{self._asked.id}",
            "object": "text_completion",
            "created": self._created,
            "model": self._asked.task,
        }

    def _choice(self, pieces: Sequence[Piece]) -> Json:
        return {
            "text": "".join(piece.text for piece in pieces),
            "logprobs": _joined([piece.logprobs for piece in pieces if piece.logprobs]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _parts(self, piece: Piece) -> Iterator[Json]:
        yield {
            "index": 0,
            "text": piece.text,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
        }


class ChatForm(Form):
    """`chat.completion` objects; calls of the request's tools become `tool_calls`."""

    def __init__(self, asked: Asked, request: ChatRequest) -> None:
        options = request.stream_options
        super().__init__(asked, request.return_token_ids, bool(options and options.include_usage))
        tools = request.tools if request.tool_choice != "none" else None
        self._functions = {tool.function.name for tool in tools or ()}
        self._held = ""
        self._holds = bool(self._functions)
        self._begun = False

    def _head(self, stream: bool) -> Json:
        return {
            "id": f"chatcmpl-{self._asked.id}",
            "object": "chat.completion.chunk" if stream else "chat.completion",
            "created": self._created,
            "model": self._asked.task,
        }

    def _choice(self, pieces: Sequence[Piece]) -> Json:
        text = "".join(piece.text for piece in pieces)
        calls = parse_calls(text, self._functions) if self._functions else None
        message: Json = {"role": "assistant", "content": text}
        if calls:
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        scores = [entry for piece in pieces for entry in self._scores(piece)]
        return {
            "message": message,
            "logprobs": {"content": scores} if scores else None,
            "finish_reason": "tool_calls" if calls else pieces[-1].finish_reason,
        }

    def _parts(self, piece: Piece) -> Iterator[Json]:
        delta: Json = {} if self._begun else {"role": "assistant"}
        self._begun, reason, text = True, piece.finish_reason, piece.text
        scores = self._scores(piece)
        if self._holds:
            # What may become a call is held back until it cannot, or the answer has ended.
            self._held += text
            text = ""
            if reason is not None and (calls := parse_calls(self._held, self._functions)):
                numbered = [{**call, "index": place} for place, call in enumerate(calls)]
                yield _part({**delta, "tool_calls": numbered}, scores, None)
                # The end is a chunk of its own: OpenAI's client takes calls for ended only then.
                delta, scores, reason = {}, [], "tool_calls"
            elif reason is not None or not may_be_call(self._held):
                text, self._holds = self._held, False
        if not self._holds:
            delta["content"] = text
        yield _part(delta, scores, reason)

    def _scores(self, piece: Piece) -> list[Json]:
        return _chat_scores(piece.logprobs, self._asked.logprobs or 0)


def _part(delta: Json, scores: list[Json], reason: str | None) -> Json:
    """A choice of a chat's chunk."""
    return {
        "index": 0,
        "delta": delta,
        "logprobs": {"content": scores} if scores else None,
        "finish_reason": reason,
    }


def _joined(scores: Sequence[Json]) -> Json | None:
    """The log-probabilities of several pieces as those of one."""
    if not scores:
        return None
    return {key: [entry for one in scores for entry in one.get(key) or ()] for key in scores[0]}


def _chat_scores(scores: Json | None, likeliest: int) -> list[Json]:
    """A piece's log-probabilities as chats have them, one entry a token.

    Completions have the chosen token among the likeliest even where it is not; chats do not.
    """
    if not scores:
        return []
    others = scores.get("top_logprobs") or [None] * len(scores["tokens"])
    return [
        {
            **_scored(token, score),
            "top_logprobs": [_scored(*other) for other in _ranked(these or {})[:likeliest]],
        }
        for token, score, these in zip(
            scores["tokens"], scores["token_logprobs"], others, strict=True
        )
    ]


def _ranked(scores: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda scored: -scored[1])


def _scored(token: str, score: float) -> Json:
    return {"token": token, "logprob": score, "bytes": list(token.encode())}
