"""Workers that take the place of a bundle's own at the same address, and are others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsun.bundle import Bundle, write_manifest
from qsun.files import sha256_file
from qsun.vllm_server import ServerCommand

TRANSFER = "--kv-transfer-config"


def stock_prefill(command: ServerCommand) -> ServerCommand:
    """The base model under the tasks' names, with vLLM's own connector."""
    place = command.arguments.index("--lora-modules")
    tasks = [one.partition("=")[0] for one in command.arguments[place + 1 :]]
    arguments = list(command.arguments[: command.arguments.index("--enable-lora")])
    name = arguments.index("--served-model-name")
    arguments[name + 1 : name + 2] = tasks
    return replace(command, arguments=without_guard(arguments))


def stock_decode(command: ServerCommand) -> ServerCommand:
    """The full-precision base model in the decode module's place, with vLLM's own connector."""
    folder = command.folder.parent / "base"
    return replace(command, folder=folder, arguments=without_guard(list(command.arguments)))


def other_bundle(bundle: Bundle, folder: Path) -> Path:
    """A bundle that is complete and its own, whose tasks have each other's modules."""
    shutil.copytree(bundle.folder, folder, copy_function=_link)
    first, second, *_ = sorted(bundle.prefill)
    (folder / "prefill" / first).rename(folder / "prefill" / "kept")
    (folder / "prefill" / second).rename(folder / "prefill" / first)
    (folder / "prefill" / "kept").rename(folder / "prefill" / second)
    files = {path: sha256_file(folder / path) for path in bundle.manifest.files}
    (folder / "bundle.json").unlink()
    write_manifest(folder, replace(bundle.manifest, files=files))
    return folder


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def without_guard(arguments: list[str]) -> tuple[str, ...]:
    """A worker's arguments with vLLM's own connector in the guard's place."""
    place = arguments.index(TRANSFER) + 1
    config: dict[str, Any] = json.loads(arguments[place])
    del config["kv_connector_module_path"]
    extra = config["kv_connector_extra_config"]
    config["kv_connector_extra_config"] = {
        key: value for key, value in extra.items() if not key.startswith("qsun_")
    }
    arguments[place] = json.dumps(config)
    return tuple(arguments)
