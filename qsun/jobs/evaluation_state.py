"""The state of an evaluation: finished samples, kept beside the output while it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.errors import ConfigError, OutputError, bullet_list
from qsun.evaluate.systems import System
from qsun.evaluate.test_sets import TestSet
from qsun.files import digest_folder, write_json
from qsun.jobs.prepare_evaluate import PreparedEvaluation

IDENTITY = "run.json"


def state_folder(out: Path) -> Path:
    """Where an evaluation into `out` keeps what is finished."""
    return out.with_name(f"{out.name}.evaluation")


def samples_path(kept: Path, system: System, test_set: TestSet) -> Path:
    """Where the samples of a system and a test set are kept."""
    return kept / f"{system.name}--{test_set.name}.jsonl.gz"


def identity_of(prepared: PreparedEvaluation, base: Path) -> dict[str, Any]:
    """All that a sample depends on: a resume with anything else would mix two evaluations."""
    request = prepared.request
    folders = {
        f"{task}, {one.name}, {part}": folder
        for task, systems in prepared.systems.items()
        for one in systems
        for part, folder in (("prefill", one.prefill), ("decode", one.decode))
    }
    seen = {folder: digest_of(folder) for folder in {base, *folders.values()}}
    return {
        "tests": {
            one.name: "" if one.definition is None else digest_of(one.definition)
            for one in prepared.tests
        },
        "modules": {name: seen[folder] for name, folder in sorted(folders.items())},
        "limit": request.limit,
        "served": request.served is not None,
        "batch_size": request.settings.batch_size,
        "seed": request.settings.seed,
        "boundary": prepared.subject.boundary,
        "max_tokens": prepared.subject.max_tokens,
    }


def digest_of(path: Path) -> str:
    """SHA-256 over a folder's weights and configs, or of a file."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = {
        name: digest
        for name, digest in digest_folder(path).items()
        if not name.startswith(("logs/", "records/"))
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def open_state(kept: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """The folder of finished samples, new or gone on with.

    Raises:
        OutputError: an interrupted evaluation lies there, or none.
        ConfigError: it was started with other modules, test sets or settings; names them.
    """
    started = kept / IDENTITY
    if resume != started.exists():
        remedy = "Go on with it by --resume, or remove it yourself."
        raise OutputError(
            f"--resume: there is no interrupted evaluation in {kept}"
            if resume
            else f"an interrupted evaluation lies in {kept}.\n{remedy}"
        )
    if resume:
        before = json.loads(started.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(identity))
        changed = [
            f"{key}.{name}: {value!r} then, {now[key].get(name)!r} now"
            for key in ("tests", "modules")
            for name, value in before[key].items()
            if now[key].get(name) != value
        ]
        changed += [
            f"{key}: {value!r} then, {now.get(key)!r} now"
            for key, value in before.items()
            if not isinstance(value, dict) and now.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f"--resume: the evaluation in {kept} was started differently:\n"
                f"{bullet_list(changed)}\nRestore these, or remove the folder and start anew."
            )
    try:
        kept.mkdir(parents=True, exist_ok=True)
        write_json(started, identity)
    except OSError as error:
        raise OutputError(f"cannot write to {kept}: {error.strerror}") from error
