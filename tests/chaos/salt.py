"""What the salt is for: the same prompts of two tasks, with and without it.

    python -m tests.chaos.salt BUNDLE docs/records/serving-salt.json

The workers are set up as guards refuse to start: vLLM's own connector, and a decode worker that
keeps what it has fetched in a prefix cache. Its next request with the same tokens gets that cache,
whoever wrote it, unless the salt says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsun.bundle import Bundle, read_bundle
from qsun.config import ServeConfig
from qsun.disaggregation import COMPLETIONS, KEEP_FOR_DECODE, Asked
from qsun.environments import find_serving_environment
from qsun.launch_spec import launch_spec
from qsun.progress import announce
from qsun.records import new_record
from qsun.references import read_references
from qsun.serve.run import salts_of
from qsun.vllm_server import ServerCommand, VllmServer, serve_all
from qsun.workers import worker_commands
from tests.chaos.impostors import without_guard

PROMPTS, NEW_TOKENS, BLOCK_TOKENS = 24, 8, 128


def careless(command: ServerCommand) -> ServerCommand:
    """A worker as guards would not start it."""
    arguments = without_guard(list(command.arguments))
    cached = [one.replace("--no-enable-prefix", "--enable-prefix") for one in arguments]
    return replace(command, arguments=tuple(cached))


def answer(workers: Mapping[str, VllmServer], task: str, prompt: list[int], salt: str) -> list[int]:
    """The tokens of one hand-off."""
    asked = Asked(tuple(prompt), NEW_TOKENS, salt)
    body = asked.body(1, 0) | {"model": task, "kv_transfer_params": KEEP_FOR_DECODE}
    written = workers["prefill"].post(COMPLETIONS, body)["kv_transfer_params"]
    body = asked.body(NEW_TOKENS, 0) | {"kv_transfer_params": written}
    tokens: list[int] = workers["decode"].post(COMPLETIONS, body)["choices"][0]["token_ids"]
    return tokens


def prompts_of(bundle: Bundle) -> list[list[int]]:
    """Prompts of more than a cache block, out of the tasks' own words."""
    vocabulary = bundle.manifest.kv_layout["vocabulary"]
    rows = read_references(bundle.folder / "verification/math.jsonl", vocabulary)
    words = [token for row in rows for token in (*row.prompt, *row.response)] * 3
    return [words[place * 7 :][: BLOCK_TOKENS * 2 + 5] for place in range(PROMPTS)]


def main() -> None:
    """Ask, compare and write the record."""
    bundle, out = read_bundle(Path(sys.argv[1]).absolute()), Path(sys.argv[2])
    spec = launch_spec(bundle.manifest, "cpu")
    commands = [careless(command) for command in worker_commands(bundle.folder, spec)]
    tasks, salts = sorted(bundle.prefill), salts_of(bundle.manifest)
    with serve_all(find_serving_environment().python, commands, 600) as servers:
        workers = dict(zip((worker.name for worker in spec.workers), servers, strict=True))
        found: dict[str, Any] = {}
        for kind in ("a salt for each task", "one salt for all"):
            announce(f"salt: {kind}")
            wrong = 0
            for place, prompt in enumerate(prompts_of(bundle)):
                for task in tasks:
                    alone = answer(workers, task, prompt, f"{task}.{place}.{len(found)}.alone")
                    salt = "one-for-all" if found else salts[task]
                    wrong += answer(workers, task, prompt, salt) != alone
            found[kind] = {"answers": PROMPTS * len(tasks), "wrong": wrong}
    new_record("serving-salt", ServeConfig(), 0, found).write(out)
    print(found)


if __name__ == "__main__":
    main()
