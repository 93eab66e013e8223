"""Clients that ask one streamed completion after another, and time its first byte."""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from qsun.disaggregation import COMPLETIONS, KEEP_FOR_DECODE, WrittenAs
from qsun.launch_arguments import DECODE_NAME
from qsun.serve.asked import Asked

HEAD_END = b"\r\n\r\n"
STREAM_END = b"0\r\n\r\n"
EVENT, TEXT = b"data: ", b'"text":'
ANSWER_S = 60.0


@dataclass(frozen=True)
class Load:
    """So many streams at once, each of `tokens` chunks, `chunks_per_s` of them a second.

    0 is as fast as they are relayed. For `seconds`, or until `requests` were answered.
    """

    streams: int
    tokens: int
    chunks_per_s: float
    seconds: float = 0.0
    requests: int = 0


@dataclass
class Sample:
    """What clients saw over `wall_s`: chunks, and after the warm-up seconds to first bytes."""

    first_byte_s: list[float] = field(default_factory=list)
    chunks: int = 0
    requests: int = 0
    wall_s: float = 0.0


class Connection(asyncio.Protocol):
    """A kept connection on which one request is answered at a time, whole or as a stream."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._whole_length = 0
        self._is_stream = False
        self._answer: asyncio.Future[bytes] | None = None
        self.first_byte = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("closed before its answer ended"))

    async def ask(self, body: Mapping[str, Any]) -> bytes:
        """The answer, head and all. `first_byte` is then when its first event came."""
        self._received.clear()
        self._whole_length, self._is_stream, self.first_byte = 0, False, 0.0
        self._answer = asyncio.get_running_loop().create_future()
        data = orjson.dumps(body)
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        self._transport.write(head.encode() + data)
        async with asyncio.timeout(ANSWER_S):
            return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not (self._is_stream or self._whole_length):
            self._read_head()
        if self._is_stream:
            if not self.first_byte and EVENT in self._received:
                self.first_byte = time.perf_counter()
            ended = self._received.endswith(STREAM_END)
        else:
            ended = 0 < self._whole_length <= len(self._received)
        if ended and self._answer is not None:
            self._answer.set_result(bytes(self._received))

    def _read_head(self) -> None:
        end = self._received.find(HEAD_END)
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        _, found, length = head.partition(b"content-length:")
        if found:
            self._whole_length = end + len(HEAD_END) + int(length.split(b"\r\n", 1)[0])
        self._is_stream = not found

    def close(self) -> None:
        self._answer = None
        self._transport.close()


class Client(ABC):
    """Asks for one stream at a time, always with the same prompt."""

    def __init__(self, prompt: list[int], task: str) -> None:
        self._prompt, self._task = prompt, task

    @abstractmethod
    async def connect(self) -> None: ...

    @abstractmethod
    async def ask(self, tokens: int) -> tuple[float, bytes]:
        """Seconds to the first byte of the answer, and all of it."""

    @abstractmethod
    def close(self) -> None: ...


class RoutedClient(Client):
    """As a router's clients ask."""

    def __init__(self, prompt: list[int], task: str, port: int) -> None:
        super().__init__(prompt, task)
        self._port = port

    async def connect(self) -> None:
        self._connection = await connected(self._port)

    async def ask(self, tokens: int) -> tuple[float, bytes]:
        body = {"model": self._task, "prompt": self._prompt, "max_tokens": tokens, "stream": True}
        begun = time.perf_counter()
        answer = await self._connection.ask(body)
        return self._connection.first_byte - begun, answer

    def close(self) -> None:
        self._connection.close()


class DirectClient(Client):
    """Asks the workers itself, prefill and then decode: what a router adds is beside this."""

    def __init__(self, prompt: list[int], task: str, prefill: int, decode: int) -> None:
        super().__init__(prompt, task)
        self._ports = prefill, decode

    async def connect(self) -> None:
        prefill, decode = self._ports
        self._prefill, self._decode = await connected(prefill), await connected(decode)

    async def ask(self, tokens: int) -> tuple[float, bytes]:
        begun = time.perf_counter()
        asked = Asked(WrittenAs(self._task, ""), self._prompt, tokens, "salt", id="")
        read = await self._prefill.ask(asked.prefill_body(KEEP_FOR_DECODE))
        parameters = orjson.loads(read.partition(HEAD_END)[2])["kv_transfer_params"]
        answer = await self._decode.ask(asked.decode_body(DECODE_NAME, parameters))
        return self._decode.first_byte - begun, answer

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()


async def connected(port: int) -> Connection:
    """A connection to a port of this machine."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


async def measure(clients: list[Client], load: Load, warm_up_s: float, seed: int) -> Sample:
    """Put a load on; first bytes of answers begun in the first `warm_up_s` seconds do not count.

    Clients begin one after another over the time that one answer takes, so that paced streams do
    not march in step.
    """
    rng, sample = random.Random(seed), Sample()
    spread_s = load.tokens / load.chunks_per_s if load.chunks_per_s else 0.0
    for client in clients:
        await client.connect()
    begun = time.perf_counter()
    counts_from, ends = begun + warm_up_s, begun + warm_up_s + load.seconds

    def goes_on(now: float) -> bool:
        return now < ends if load.seconds else sample.requests < load.requests

    async def one(client: Client, offset_s: float) -> None:
        await asyncio.sleep(offset_s)
        while goes_on(now := time.perf_counter()):
            first_byte_s, answer = await client.ask(load.tokens)
            check(answer, load.tokens)
            sample.requests += 1
            sample.chunks += load.tokens
            if now >= counts_from:
                sample.first_byte_s.append(first_byte_s)

    try:
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(one(client, rng.uniform(0, spread_s)))
    finally:
        for client in clients:
            client.close()
    sample.wall_s = time.perf_counter() - begun
    return sample


def check(answer: bytes, tokens: int) -> None:
    """That an answer is all there."""
    events = answer.count(TEXT)
    if not answer.startswith(b"HTTP/1.1 200") or events != tokens or b"[DONE]" not in answer:
        raise SystemExit(f"{events} of {tokens} chunks came: {answer[:500]!r}")
