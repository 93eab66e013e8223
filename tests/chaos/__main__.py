"""Faults under load, with real vLLM workers: what became of every request.

    python -m tests.chaos BUNDLE docs/records/serving-chaos.json

Two prefill workers (both tasks each) and two decode workers run beside one `qsun serve --external`.
While clients ask, workers are killed, frozen for longer than a cache is kept, replaced by others at
the same address, and caches are lost on their way. Every answer is compared with the same task's
answer in calm; one that differs must be one that the task's own modules could have given, as this
process computes them. Then the same kinds of fault over fake workers, many more of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from qsun.bundle import Bundle, read_bundle
from qsun.progress import announce
from qsun.records import new_record
from qsun.references import read_references
from qsun.verify.served.in_process import InProcess
from qsun.vllm_server import stop_servers
from tests.chaos.load import DEADLINE_S, LIMITS, Asked, Chaos, ask, says
from tests.chaos.phases import PHASES
from tests.chaos.storm import storm
from tests.chaos.workers import start_router, start_workers

CLIENTS, SEED = 6, 11
TIE_NATS = 1.0
FAKE_REQUESTS = 10_000


def prompts_of(bundle: Bundle) -> dict[str, list[list[int]]]:
    """Every task's own prompts."""
    vocabulary = bundle.manifest.kv_layout["vocabulary"]
    return {
        task: [
            list(row.prompt)
            for row in read_references(bundle.folder / f"verification/{task}.jsonl", vocabulary)
        ]
        for task in sorted(bundle.prefill)
    }


async def run(chaos: Chaos) -> None:
    """Ask in calm, then through every phase, then let everything come to rest."""
    await chaos.ready()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for task, prompts in chaos.prompts.items():
            for place in range(len(prompts)):
                one = Asked("calm", task, place, False)
                outcome, tokens = await ask(session, chaos.router, one, chaos.prompts)
                assert outcome == "answered", f"{task} {place} in calm: {outcome}"
                chaos.calm[task, place] = tokens
        clients = [
            asyncio.create_task(chaos.client(session, random.Random(SEED + number)))
            for number in range(CLIENTS)
        ]
        for phase in PHASES:
            chaos.phase = phase.__name__
            announce(f"chaos: {chaos.phase}")
            await phase(chaos)
            await asyncio.sleep(5)
        chaos.going = False
        await asyncio.gather(*clients)


async def at_rest(chaos: Chaos) -> dict[str, float]:
    """The share of KV blocks in use of each worker, once leases have ended."""
    deadline = time.monotonic() + 60
    while True:
        used = {name: worker.used() for name, worker in chaos.workers.items()}
        if not any(used.values()) or time.monotonic() > deadline:
            return used
        await asyncio.sleep(1)


def judge(chaos: Chaos) -> dict[str, Any]:
    """Figures by phase. What differs from the calm answer is computed again in this process."""
    reference = InProcess(chaos.bundle)
    phases: dict[str, dict[str, int]] = {}
    likest, wrong = 0.0, []
    for one in sorted(chaos.asked, key=lambda one: one.task):
        counts = phases.setdefault(one.phase, {})
        outcome = one.outcome
        expected = chaos.calm[one.task, one.place]
        if one.tokens and one.tokens != expected[: len(one.tokens)]:
            prompt = chaos.prompts[one.task][one.place]
            gap = max(reference.score(one.task, prompt, one.tokens).gaps)
            likest = max(likest, gap)
            outcome = f"{outcome}, another tie" if gap <= TIE_NATS else "WRONG"
            if gap > TIE_NATS:
                wrong.append({"phase": one.phase, "task": one.task, "gap_nats": gap})
        counts[outcome] = counts.get(outcome, 0) + 1
    outcomes = [outcome for counts in phases.values() for outcome in counts]
    return {
        "requests": len(chaos.asked),
        "wrong": len(wrong),
        "wrong_answers": wrong,
        "empty": sum(counts.get("empty", 0) for counts in phases.values()),
        "hung": sum(counts.get("hung", 0) for counts in phases.values()),
        "kinds_of_outcome": sorted(set(outcomes)),
        "longest_s": round(max(one.seconds for one in chaos.asked), 1),
        "deadline_s": DEADLINE_S,
        "largest_tie_nats": round(likest, 3),
        "phases": {phase.__name__: phases.get(phase.__name__, {}) for phase in PHASES},
    }


def refusals(folder: Path) -> dict[str, int]:
    """How often guards refused, by what they said."""
    said = {
        "refused requests": "qsun refuses ",
        "caches after their lease": "qsun: caches that came after their lease",
        "caches without a seal": "qsun: a cache that no prefill worker of this bundle sealed",
    }
    text = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))
    return {name: text.count(words) for name, words in said.items()}


def main() -> None:
    """Run everything and write the record."""
    bundle, out = read_bundle(Path(sys.argv[1]).absolute()), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fault_file = folder / "fault"
        workers = start_workers(bundle, folder, fault_file)
        url, router = start_router(bundle, workers, folder, LIMITS)
        chaos = Chaos(bundle, workers, url, fault_file, prompts_of(bundle))
        try:
            asyncio.run(run(chaos))
            used = asyncio.run(at_rest(chaos))
            left = httpx.get(f"{chaos.router}/metrics", timeout=30).text
        finally:
            router.terminate()
            router.wait(60)
            stop_servers([one.process for one in chaos.workers.values() if one.process])
        real = judge(chaos) | {
            "kv_blocks_in_use_at_rest": used,
            "requests_in_flight_at_rest": sum(
                not says(left, f'worker="{name}@', "qsun_in_flight_requests", 0)
                for name, worker in chaos.workers.items()
                if worker.role == "decode"
            ),
            "guards": refusals(folder),
        }
    announce("chaos: fake workers")
    fake = asyncio.run(storm(bundle.tokenizer, FAKE_REQUESTS, SEED)).summary()
    new_record("serving-chaos", LIMITS, SEED, {"real_workers": real, "fake_workers": fake}).write(
        out
    )
    print(json.dumps({"real_workers": real, "fake_workers": fake}, indent=1))


if __name__ == "__main__":
    main()
