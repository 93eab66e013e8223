"""Workers that cost next to nothing, so that what is measured is the router before them.

Answers as `tests/fake_workers.py`'s, put together beforehand and written by a bare protocol. Each
chunk of a stream is a write of its own, as vLLM's are.

    python -m tests.overhead_workers ROLE BUNDLE_DIGEST PORT [PORT ...]

`GET /pace/RATE` sets the chunks a second of each stream; 0 is as fast as they are taken.
"""

from __future__ import annotations

import asyncio
import sys
from functools import cache
from itertools import count
from typing import Any, cast

import orjson
import uvloop

from qsun.disaggregation import SEAL, SEAL_DIGITS, SEPARATOR
from tests.fake_workers import BLOCK_TOKENS, METRICS

BLOCKS = 2**17  # KV blocks: never what a request waits for
HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


class Worker:
    """What all connections of a worker share."""

    def __init__(self, role: str, bundle: str) -> None:
        self.role, self._bundle = role, bundle
        self.chunks_per_s = 0.0
        self._requests = count()

    def get(self, path: bytes) -> bytes:
        """The answer to a GET, whole."""
        if path.startswith(b"/pace/"):
            self.chunks_per_s = float(path.removeprefix(b"/pace/"))
        if path == b"/metrics":
            text = METRICS.format(size=BLOCK_TOKENS, blocks=BLOCKS, used=0.0, generated=0, steps=0)
            return whole(text.encode(), b"text/plain")
        return whole(b"{}")

    def prefill(self, body: dict[str, Any]) -> bytes:
        """The answer of a prefill worker: where the prompt's cache lies."""
        prompt, task = body["prompt"], body["model"]
        parameters = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[1]],
            "remote_engine_id": SEPARATOR.join((SEAL, self._bundle[:SEAL_DIGITS], task, "engine")),
            "remote_request_id": f"cmpl-{next(self._requests)}",
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "remote_num_tokens": len(prompt),
        }
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = prompt
        answer = {"id": "cmpl-x", "object": "text_completion", "model": task, "choices": [choice]}
        return whole(orjson.dumps(answer | {"kv_transfer_params": parameters}))


class Connection(asyncio.Protocol):
    """One client's connection: requests one after another, at most one answer at a time."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._chunks: list[bytes] = []
        self._place, self._begun = 0, 0.0
        self._paused = self._stalled = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def connection_lost(self, exc: Exception | None) -> None:
        self._chunks = []

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._stalled:
            self._stalled = False
            self._next()

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(HEAD_END)
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        place = head.find(LENGTH)
        length = 0 if place < 0 else int(head[place + len(LENGTH) :].split(b"\r\n", 1)[0])
        whole_length = end + len(HEAD_END) + length
        if len(self._received) < whole_length:
            return
        body = bytes(self._received[end + len(HEAD_END) : whole_length])
        del self._received[:whole_length]
        method, path, _ = head.split(b" ", 2)
        self._answer(path if method == b"get" else b"", body)

    def _answer(self, path: bytes, body: bytes) -> None:
        if path:
            self._transport.write(self._worker.get(path))
            return
        asked = orjson.loads(body)
        if self._worker.role == "prefill":
            self._transport.write(self._worker.prefill(asked))
            return
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        self._chunks = stream(asked["max_tokens"], usage)
        self._place, self._begun = 0, self._loop.time()
        self._transport.write(STREAM_HEAD)
        self._next()

    def _next(self) -> None:
        """Write the next chunk, and see to it that the one after that is."""
        if self._paused or not self._chunks:
            self._stalled = True
            return
        self._transport.write(self._chunks[self._place])
        self._place += 1
        if self._place == len(self._chunks):
            return
        if not self._worker.chunks_per_s:
            self._loop.call_soon(self._next)
            return
        # From the begin, so that delays do not add up.
        due = self._begun + self._place / self._worker.chunks_per_s
        self._loop.call_later(max(0.0, due - self._loop.time()), self._next)


@cache
def stream(tokens: int, usage: bool) -> list[bytes]:
    """A decode worker's chunks, one a token; the last also has what ends a stream."""
    events = []
    for place in range(tokens):
        choice = {
            "index": 0,
            "text": f" token{place}",
            "logprobs": None,
            "finish_reason": "length" if place + 1 == tokens else None,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": [place],
        }
        events.append({**EVENT, "choices": [choice]})
    chunks = [chunk(orjson.dumps(event)) for event in events]
    if usage:
        chunks[-1] += chunk(orjson.dumps({**EVENT, "choices": [], "usage": {"prompt_tokens": 1}}))
    chunks[-1] += chunk(b"[DONE]") + b"0\r\n\r\n"
    return chunks


EVENT = {"id": "cmpl-x", "object": "text_completion", "created": 1, "model": "decode"}


def chunk(data: bytes) -> bytes:
    """An event in a chunk of its own."""
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def whole(body: bytes, kind: bytes = b"application/json") -> bytes:
    """An answer that is no stream."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d" % (kind, len(body))
    return head + HEAD_END + body


async def main(role: str, bundle: str, ports: list[int]) -> None:
    """Listen until killed: as several workers that share this process, one a port."""
    worker, loop = Worker(role, bundle), asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(lambda: Connection(worker), "127.0.0.1", port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    role, bundle, *ports = sys.argv[1:]
    uvloop.run(main(role, bundle, [int(port) for port in ports]))
