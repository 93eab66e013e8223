"""A tiny search by engine qsun on disk, as a user has it: two sources, each with its own module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qsun.files import digest_folder
from qsun.models import load_model
from qsun.prefill_module import save_prefill
from tests.builders import problems, tiny_model, write_config, write_definition, write_jsonl
from tests.command import Outcome, run_qsun
from tests.reference import with_adapter

BLOCKS = 4
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
    """SHA-256 of every file that a search has published, its record left out."""
    found = digest_folder(config.parent.parent / "out" / "module")
    return {name: digest for name, digest in found.items() if not name.startswith("records/")}
