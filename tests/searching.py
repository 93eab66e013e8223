"""A tiny search by engine qsun on disk, as a user has it: two sources, each with its own module."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun.files import digest_folder
from qsun.jobs.block_walk import BlockWalk
from qsun.models import load_model
from qsun.prefill_module import save_prefill
from tests.builders import problems, tiny_model, write_config, write_definition, write_jsonl
from tests.command import Outcome, run_qsun
from tests.reference import with_adapter

BLOCKS = 4
EVERY_BLOCK = ("--set", "quantize.search.keep_every_s=0")
FAILURE = "no such kernel"
RECORD = "records/quantization.json"
SHAPE: dict[str, Any] = {"hidden": 64, "intermediate": 64, "layers": BLOCKS}
PREFILL = [{"task": "sums", "module": "../lora"}, {"task": "more", "module": "../full"}]


def write_search(folder: Path, **search: Any) -> Path:
    """Write base, a LoRA and a full prefill module, texts and config; returns the config's path.

    `search` are settings of section `quantize.search`.
    """
    tiny_model(folder / "base", **SHAPE)
    write_adapter(folder, seed=1)
    tiny_model(folder / "full", seed=2, **SHAPE)
    run = folder / "run"
    run.mkdir()
    write_rows(run)
    columns = {"kind": "jsonl", "prompt": "prompt", "response": "response"}
    sources = [{"name": one["task"], "path": f"{one['task']}.jsonl", **columns} for one in PREFILL]
    write_definition(run / "calibration.yaml", *sources, max_tokens=96)
    quick = {"prefill": PREFILL, "sweeps": 1, **search}
    return write_config(run, "../base", quantize__engine="qsun", quantize__search=quick)


def write_rows(run: Path, seed: int = 1) -> None:
    """Write the rows of both sources."""
    write_jsonl(run / "sums.jsonl", problems(6, seed=seed))
    write_jsonl(run / "more.jsonl", problems(6, seed=7))


def write_adapter(folder: Path, seed: int) -> None:
    """Write the LoRA module of the base model in `folder`."""
    module = with_adapter(load_model(folder / "base", "bfloat16"), seed)
    save_prefill(module, folder / "lora", torch.bfloat16, "../base")


def search(config: Path, *options: str) -> Outcome:
    """Run `qsun quantize`, into `out/module` beside the config's folder."""
    out = config.parent.parent / "out"
    out.mkdir(exist_ok=True)
    return run_qsun("quantize", config, "--out", out / "module", "--json", *options)


def digests(config: Path) -> dict[str, str]:
    """SHA-256 of every file that a search has published, but the record, which tells the time."""
    found = digest_folder(config.parent.parent / "out" / "module")
    return {name: digest for name, digest in found.items() if name != RECORD}


def finished_search(folder: Path) -> Path:
    """Write a search and run it to its end; returns the config's path."""
    config = write_search(folder)
    outcome = search(config)
    assert outcome.exit_code == 0, outcome.stderr
    return config


def copy_search(config: Path, folder: Path) -> Path:
    """Copy all that a search reads to `folder`, and nothing that it has made; gives its config."""
    shutil.copytree(config.parent.parent, folder, ignore=shutil.ignore_patterns("out"))
    return folder / "run" / "run.yaml"


def interrupt(config: Path, *options: str) -> None:
    """Begin a search that fails in its third block, with the streams before it kept."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, BlockWalk, "quantize", 2, fail)
        with pytest.raises(RuntimeError, match=FAILURE):
            search(config, *EVERY_BLOCK, *options)


def stop_at(
    patch: pytest.MonkeyPatch, owner: Any, name: str, at: int, stop: Callable[[], None]
) -> None:
    """Call `stop` in place of the `at`th call."""
    original = getattr(owner, name)
    calls: list[None] = []

    def stopping(*arguments: Any, **named: Any) -> Any:
        if len(calls) == at:
            stop()
        calls.append(None)
        return original(*arguments, **named)

    patch.setattr(owner, name, stopping)


def fail() -> None:
    """What a bug or a broken machine does."""
    raise RuntimeError(FAILURE)


def state(config: Path) -> Path:
    """Where a search keeps what is finished."""
    return config.parent.parent / "out" / "module.quantization"


def names(config: Path) -> list[str]:
    """What lies where a search publishes."""
    return sorted(path.name for path in (config.parent.parent / "out").iterdir())


def cut_short(path: Path) -> None:
    """Leave a file as a machine that went down may leave it."""
    path.write_bytes(path.read_bytes()[:-100])
