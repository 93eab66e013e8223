"""The two hops of a request: to a prefill worker, then to a decode worker. Each has a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import orjson

from qsun.config import ServeConfig
from qsun.disaggregation import COMPLETIONS, KEEP_FOR_DECODE, HandOffError, handed_over
from qsun.launch_arguments import DECODE_NAME
from qsun.serve.asked import Asked, Piece
from qsun.serve.pool import Worker

SHOWN_CHARACTERS = 300
LONGEST_LINE = 2**22  # bytes; log-probabilities of many tokens come in one
ENDINGS = ("stop", "length")
CLIENT_FAULTS = (400, 413, 422)
DONE = b"[DONE]"
DATA = b"data: "


class HopError(Exception):
    """A worker that gave no answer, or a wrong one. `reason` is one of a few, for counting.

    `lost` says that it must not be asked again before it has joined anew: it may be gone, or
    another one in its place.
    """

    def __init__(self, worker: Worker, reason: str, message: str, lost: bool = False) -> None:
        super().__init__(f"{worker.name}: {message}")
        self.worker, self.reason, self.lost = worker, reason, lost


class RefusedByWorker(HopError):
    """A worker found fault with the request itself: another worker would, too."""

    def __init__(self, worker: Worker, message: str) -> None:
        super().__init__(worker, "refused", message)
        self.message = message


class Hops:
    """Requests to workers, over one HTTP session."""

    def __init__(self, session: aiohttp.ClientSession, limits: ServeConfig) -> None:
        self._session, self._limits = session, limits

    async def prefill(self, worker: Worker, asked: Asked) -> dict[str, Any]:
        """Have the prompt read; where its cache lies.

        Raises:
            HopError: it answered late, wrongly or not at all, or handed nothing over.
        """
        async with (
            _deadline(worker, self._limits.prefill_s, "prefill_deadline", lost=False),
            self._post(worker, asked.prefill_body(KEEP_FOR_DECODE), asked.id) as response,
        ):
            answer = await _json(worker, response)
        try:
            return handed_over(answer, asked.prompt, asked.written, worker.name)
        except (HandOffError, LookupError, TypeError) as error:
            raise HopError(worker, "no_hand_off", str(error), lost=True) from error

    async def decode(
        self, worker: Worker, asked: Asked, parameters: Mapping[str, Any]
    ) -> AsyncGenerator[Piece, None]:
        """The answer, piece by piece, the last with its `finish_reason`.

        Raises:
            HopError: it answered late, wrongly or not at all, or stopped before the end.
        """
        body = asked.decode_body(DECODE_NAME, parameters)
        wait_s, reason = self._limits.first_token_s, "first_token_deadline"
        finished, begun = False, b""
        async with AsyncExitStack() as stack:
            async with _deadline(worker, wait_s, reason):
                response = await stack.enter_async_context(self._post(worker, body, asked.id))
            # Whatever has come at once: an event is several lines, and each wait has its price.
            while block := await _block(worker, response.content, wait_s, reason):
                *lines, begun = (begun + block).split(b"\n")
                if len(begun) > LONGEST_LINE:
                    raise HopError(worker, "no_event", "a line without an end", lost=True)
                for line in lines:
                    piece = _piece(worker, line)
                    if piece is None:
                        continue
                    finished = piece.finish_reason is not None
                    yield piece
                    wait_s, reason = self._limits.stall_s, "stalled"
        if not finished:
            raise HopError(worker, "cut_off", "its stream ended before the answer did", lost=True)

    async def release(self, worker: Worker, asked: Asked, parameters: Mapping[str, Any]) -> None:
        """Have a cache that nobody will read given back where it lies; no more than tried."""
        body = asked.decode_body(DECODE_NAME, {**parameters, "qsun_release": True})
        try:
            async with (
                _deadline(worker, self._limits.first_token_s, "release"),
                self._post(worker, body, asked.id) as response,
            ):
                await response.read()
        except HopError:
            return  # its lease ends by itself

    @asynccontextmanager
    async def _post(
        self, worker: Worker, body: Mapping[str, Any], request_id: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        url = worker.address.url + COMPLETIONS
        try:
            async with self._session.post(
                url, data=orjson.dumps(body), headers=headers
            ) as response:
                if response.status >= 400:
                    await _raise_status(worker, response)
                yield response
        except aiohttp.ServerDisconnectedError as error:
            # A kept connection that the worker had just closed looks the same as a dead worker.
            raise HopError(worker, "connection", "it closed the connection") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # ValueError: a line longer than LONGEST_LINE.
            what = str(error) or type(error).__name__
            raise HopError(worker, "connection", what, lost=True) from error


@asynccontextmanager
async def _deadline(
    worker: Worker, seconds: float, reason: str, lost: bool = True
) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise _late(worker, seconds, reason) from error


async def _block(
    worker: Worker, stream: aiohttp.StreamReader, seconds: float, reason: str
) -> bytes:
    """What has come of a stream since it was last asked; empty at its end."""
    try:
        async with asyncio.timeout(seconds):
            return await stream.readany()
    except TimeoutError as error:
        raise _late(worker, seconds, reason) from error


def _late(worker: Worker, seconds: float, reason: str) -> HopError:
    return HopError(worker, reason, f"nothing came within {seconds:g} s", lost=True)


async def _json(worker: Worker, response: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        value = orjson.loads(await response.read())
    except orjson.JSONDecodeError as error:
        raise HopError(worker, "no_json", "its answer is no JSON") from error
    if not isinstance(value, dict):
        raise HopError(worker, "no_json", "its answer is no JSON object")
    return value


async def _raise_status(worker: Worker, response: aiohttp.ClientResponse) -> None:
    text = (await response.read())[:LONGEST_LINE].decode(errors="replace")
    try:
        message = str(orjson.loads(text)["error"]["message"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        message = text
    message = message[:SHOWN_CHARACTERS]
    if response.status in CLIENT_FAULTS:
        raise RefusedByWorker(worker, message)
    raise HopError(worker, f"status_{response.status}", f"status {response.status}: {message}")


def _told(worker: Worker, error: Mapping[str, Any]) -> HopError:
    """Some of a request's fields are checked by vLLM only when its stream has begun."""
    message = str(error.get("message", ""))[:SHOWN_CHARACTERS]
    if error.get("code") in CLIENT_FAULTS:
        return RefusedByWorker(worker, message)
    return HopError(worker, "error_event", message)


def _piece(worker: Worker, line: bytes) -> Piece | None:
    """What an event adds; None for those that add nothing."""
    if not line.startswith(DATA) or line[6:10] == DONE[:4]:
        return None
    try:
        event = orjson.loads(line[6:])
        if "error" in event:
            raise _told(worker, event["error"])
        if not event["choices"]:
            return None
        choice = event["choices"][0]
        reason = choice.get("finish_reason")
        if reason is not None and reason not in ENDINGS:
            raise HopError(worker, "bad_ending", f"it ended with {reason}")
        return Piece(choice["text"], choice.get("token_ids") or [], choice.get("logprobs"), reason)
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise HopError(worker, "no_event", f"an event that cannot be read: {error!r}") from error
