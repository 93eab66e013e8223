"""Metrics: what an operator is told of requests and workers."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from qsun.serve.pool import State
from tests.asking import COMPLETION, is_idle, metrics, until
from tests.routing import brief, routed


def test_metrics_tell_what_happened(tokenizer_folder: Path) -> None:
    async def run() -> None:
        async with routed(tokenizer_folder, prefill=1, decode=1) as here:
            for task, prompt in (("math", [1, 2, 3]), ("math", [4, 5]), ("tools", [6, 7])):
                assert (await here.complete(task, prompt))[0] == 200
            here.workers["prefill-0"].faults.append("500")
            assert (await here.complete("tools", [8, 9]))[0] == 200
            found = await metrics(here)
        math, tools = 'task="math"', 'task="tools"'
        decoder, reader = 'decode_worker="decode-0"', 'prefill_worker="prefill-0"'
        assert found[f'qsun_requests_total{{outcome="answered",{math}}}'] == 2
        assert found[f'qsun_requests_total{{outcome="answered",{tools}}}'] == 2
        retries = f'qsun_retries_total{{reason="status_500",{tools},worker="prefill-0"}}'
        assert found[retries] == 1
        assert found[f"qsun_prompt_tokens_total{{{math}}}"] == 5
        assert found[f"qsun_generated_tokens_total{{{decoder},{math}}}"] == 8
        for name, labels, count in (
            ("queue", math, 2),
            ("prefill", f"{reader},{math}", 2),
            ("hand_off", f"{decoder},{reader},{math}", 2),
            ("time_to_first_token", math, 2),
            ("inter_token", f"{decoder},{math}", 6),
            ("request", math, 2),
        ):
            assert found[f"qsun_{name}_seconds_count{{{labels}}}"] == count, name
            assert 0 <= found[f"qsun_{name}_seconds_sum{{{labels}}}"] < 5
        assert found["qsun_queue_length"] == 0
        assert found['qsun_worker_ready{role="decode",worker="decode-0"}'] == 1
        assert found['qsun_in_flight_requests{worker="decode-0"}'] == 0
        assert found['qsun_kv_reserved_ratio{worker="decode-0"}'] == 0
        assert found['qsun_kv_used_ratio{role="prefill",worker="prefill-0"}'] == 0
        for alarm in ("preemptions", "expired", "failed_transfers"):
            assert found[f'qsun_worker_{alarm}{{role="decode",worker="decode-0"}}'] == 0

    asyncio.run(run())


def test_metrics_tell_how_requests_ended_and_forget_lost_workers(tokenizer_folder: Path) -> None:
    async def run() -> None:
        limits = brief(queue_length=0, attempts=1)
        async with routed(
            tokenizer_folder, limits, prefill=1, decode=1, blocks=40, tokens_per_s=40
        ) as here:
            long = asyncio.create_task(here.complete("math", [1, 2], max_tokens=600))
            await until(lambda: here.workers["decode-0"].answering == 1)
            found = await metrics(here)
            assert found['qsun_in_flight_requests{worker="decode-0"}'] == 1
            assert found['qsun_kv_reserved_ratio{worker="decode-0"}'] == 38 / 39
            status, answer = await here.complete("math", [1, 2], max_tokens=600)
            assert (status, answer["error"]["code"]) == (429, "overloaded")
            long.cancel()
            await until(lambda: is_idle(here))
            here.workers["decode-0"].faults.append("cut")
            async with here.session.post(
                f"{here.url}/v1/completions", json={**COMPLETION, "stream": True}
            ) as response:
                assert b"broken_answer" in await response.read()
            found = await metrics(here)
            outcomes = {
                re.sub(r'.*outcome="(\w+)".*', r"\1", name): count
                for name, count in found.items()
                if name.startswith("qsun_requests_total")
            }
            assert outcomes == {"cancelled": 1, "overloaded": 1, "broken": 1}
            assert found['qsun_worker_ready{role="decode",worker="decode-0"}'] == 0
            worker = here.pool.get("decode-0")
            assert worker is not None
            here.pool.mark(worker, State.DRAINING)
            await until(lambda: here.pool.get("decode-0") is None)
            assert not any("in_flight" in name for name in await metrics(here))

    asyncio.run(run())
