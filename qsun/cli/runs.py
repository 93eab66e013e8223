"""Runs: the folders that `qsun quantize` and `qsun tune` wrote, as the config of their export."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qsun.cli import tune
from qsun.config import RunConfig, load_config
from qsun.decode_recipe import QUANTIZATION
from qsun.errors import ConfigError, QsunError, bullet_list
from qsun.jobs.prepare_export import TUNING
from qsun.records import read_record


@dataclass(frozen=True)
class Tuned:
    """A prefill module's folder, its task, and the config that tuned it, which is still there."""

    folder: Path
    task: str
    config: Path
    run: RunConfig


def runs_config(folders: Sequence[Path], overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """The config of an export of one decode module and the prefill modules, and its path.

    Each folder is told by its record. Tasks and base model are those of the config that tuned the
    first prefill module; paths in records are relative to where the commands were given.

    Raises:
        ConfigError: names every folder that is no run, and all that does not go together.
    """
    decodes = [folder for folder in folders if (folder / QUANTIZATION).is_file()]
    tuned, problems = [], []
    for folder in folders:
        if folder in decodes:
            continue
        try:
            tuned.append(_tuned(folder))
        except QsunError as error:
            problems.append(str(error))
    if len(decodes) != 1:
        found = ", ".join(map(str, decodes)) or "none"
        problems.append(f"one folder must be a decode module's, of `qsun quantize`; given: {found}")
    if not tuned and not problems:
        problems.append("no folder is of `qsun tune`: a bundle has a prefill module for each task")
    problems += [
        f"{one.folder} was tuned by {one.config}, {tuned[0].folder} by {tuned[0].config}: write a "
        "config with a section `export` that names base, tasks and modules"
        for one in tuned[1:]
        if (one.config.parent.resolve(), one.run.base)
        != (tuned[0].config.parent.resolve(), tuned[0].run.base)
    ]
    if problems:
        raise ConfigError(f"these runs make no bundle:\n{bullet_list(problems)}")
    tasks = dict.fromkeys(path for one in tuned for path in one.run.tasks)
    first = tuned[0].config
    prefill = [{"task": one.task, "module": _seen_from(first, one.folder)} for one in tuned]
    values = {
        "tasks": [*tasks],
        "export.decode": _seen_from(first, decodes[0]),
        "export.prefill": prefill,
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_config(first, [*settings, *overrides]), first


def _tuned(folder: Path) -> Tuned:
    if not (folder / TUNING).is_file():
        raise ConfigError(f"{folder} has neither {QUANTIZATION} nor {TUNING}: no run made it")
    record = read_record(folder / TUNING, "tuning")
    words = shlex.split(record.command)
    if words[:2] != ["qsun", "tune"]:
        raise ConfigError(f"{folder} was not tuned by the command `qsun tune`: {record.command}")
    try:
        given: dict[str, Any] = tune.command.make_context("tune", words[2:]).params
        run = load_config(given["config"], given["overrides"])
    except (click.ClickException, ConfigError) as error:
        raise ConfigError(f"{folder}: what tuned it, {record.command}: {error}") from error
    base, tasks = record.config["base"]["model"], record.config["tasks"]
    if (run.base.model, list(run.tasks)) != (base, tasks):
        raise ConfigError(f"{folder}: {given['config']} names another base or tasks since")
    return Tuned(folder, given["task"], given["config"], run)


def _seen_from(config: Path, folder: Path) -> str:
    return os.path.relpath(folder.absolute(), config.absolute().parent)
