"""A bench's folder: every finished run with its requests, so that an interrupted one goes on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.bench.client import Answer
from qsun.errors import ConfigError, OutputError, bullet_list
from qsun.files import refuse_used_folder, write_atomically, write_json

IDENTITY, RUNS, REQUESTS = "asked.json", "runs", "requests"


class BenchState:
    """The folder `out`: `asked.json` (what was asked for), `runs/`, `requests/`."""

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: bool) -> None:
        """Open it, new or to go on.

        Raises:
            OutputError: it is in use, cannot be written, or there is nothing to go on with.
            ConfigError: it was begun with another load or on another target; names what differs.
        """
        self._out = out
        asked = json.loads(json.dumps(identity))
        if resume:
            _compare(out / IDENTITY, asked)
            return
        refuse_used_folder(out)
        try:
            for folder in (out / RUNS, out / REQUESTS):
                folder.mkdir(parents=True)
            write_json(out / IDENTITY, asked)
        except OSError as error:
            raise OutputError(f"cannot write to {out}: {error.strerror}") from error

    def finished(self, name: str) -> dict[str, Any] | None:
        """The measures of a run that was made; none where it was not."""
        path = self._out / RUNS / f"{name}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def keep(self, name: str, answers: list[Answer], measures: Mapping[str, Any]) -> None:
        """Write a run's requests, a JSON line each, and then its measures."""
        lines = "".join(json.dumps(_line(one)) + "\n" for one in answers)
        content = gzip.compress(lines.encode(), mtime=0)
        write_atomically(self._out / REQUESTS / f"{name}.jsonl.gz", content)
        write_json(self._out / RUNS / f"{name}.json", measures)


def _line(answer: Answer) -> dict[str, Any]:
    asked = answer.request
    return {
        "at_s": asked.at_s,
        "task": asked.task,
        "prompt_tokens": asked.prompt_tokens,
        "output_tokens": asked.output_tokens,
        "sent_s": round(answer.sent_s, 6),
        "token_s": [round(one, 6) for one in answer.token_s],
        "ended_s": round(answer.ended_s, 6),
        "failure": answer.failure,
    }


def _compare(path: Path, asked: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"--resume: there is no interrupted bench in {path.parent}") from error
    changed = [
        f"{key}: {before.get(key)!r} then, {asked.get(key)!r} now"
        for key in sorted(before.keys() | asked.keys())
        if before.get(key) != asked.get(key)
    ]
    if changed:
        raise ConfigError(
            f"--resume: the bench in {path.parent} was begun differently:\n{bullet_list(changed)}"
        )
