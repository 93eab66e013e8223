"""qsun's router alone, as `qsun serve` runs it, over workers that are there already.

    python -m tests.overhead_router TOKENIZER PORT PREFILL_URL DECODE_URL [DECODE_URL ...]

TOKENIZER stands for a bundle: the router reads nothing else of one. Ends by a signal.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from qsun.config import ServeConfig
from qsun.serve.keys import Keys
from qsun.serve.pool import Address, Pool
from qsun.serve.run import Listening, serve
from tests.routing import fake_bundle

TASK = "math"


async def main(tokenizer: Path, port: int, prefill: str, decode: list[str]) -> None:
    """Route until a signal comes."""
    tasks = frozenset({TASK})
    addresses = [Address("prefill", "prefill", tasks, prefill)]
    addresses += [
        Address(f"decode-{number}", "decode", tasks, url) for number, url in enumerate(decode)
    ]

    async def background(_: Pool) -> None:
        await asyncio.Event().wait()

    await serve(
        fake_bundle(tokenizer, (TASK,)),
        addresses,
        background,
        Listening("127.0.0.1", port, Keys(), Keys()),
        ServeConfig(),
        lambda _: None,
    )


if __name__ == "__main__":
    tokenizer, port, prefill, *decode = sys.argv[1:]
    uvloop.run(main(Path(tokenizer), int(port), prefill, decode))
