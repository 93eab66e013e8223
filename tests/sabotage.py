"""Sabotage: each function does one thing to a copy of a bundle that makes it the wrong model.

What happens to a module would have happened before its export: `seal` then gives the bundle a
manifest with fresh digests. What happens to a file later is left without.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qsun.bundle import MANIFEST, Manifest, PrefillModule, read_bundle, write_manifest
from qsun.files import digest_folder, sha256_file, write_json
from qsun.launch_spec import LAUNCH_SPEC
from qsun.models import load_model
from qsun.prefill_module import save_prefill
from tests.builders import SPECIAL, tiny_model
from tests.bundles import write_tuning_record
from tests.reference import with_adapter

Sabotage = Callable[[Path], None]
JsonPath = tuple[str | int, ...]

MATH, DECODE, BASE = "prefill/math", "decode", "base"


def seal(folder: Path, **changes: Any) -> None:
    """Rewrite the manifest with the digests that the files now have, and with `changes`."""
    digests = digest_folder(folder)
    del digests[MANIFEST]
    manifest = replace(read_bundle(folder).manifest, files=digests)
    write_manifest(folder, Manifest(**(vars(manifest) | changes)))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON object in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


def set_config(part: str, **fields: Any) -> Sabotage:
    """Other fields in a module's config.json, its tensors as they were."""

    def sabotage(folder: Path) -> None:
        edit_json(folder / part / "config.json", lambda config: config.update(fields))

    return sabotage


def other_module(dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Sabotage:
    """A real model of another shape as the math task's prefill module."""

    def sabotage(folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder / MATH)
        for name, value in fields.items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder / MATH)
        record_anew(folder)

    return sabotage


def record_anew(folder: Path, **changes: Any) -> None:
    """Write the math module's tuning record for the files that it now has."""
    record = json.loads((folder / MATH / "records" / "tuning.json").read_text())["result"]
    write_tuning_record(folder / MATH, record["module"], record["base"]["sha256"], **changes)


def adapter_of_another_base(folder: Path) -> None:
    """A LoRA module that was tuned on a wider model."""
    tiny_model(folder.parent / "wide", hidden=192)
    module = with_adapter(load_model(folder.parent / "wide", "bfloat16"))
    save_prefill(module, folder / MATH, torch.bfloat16, "wide")
    record_anew(folder)


def set_adapter(**fields: Any) -> Sabotage:
    """Other fields in the math module's adapter_config.json."""

    def sabotage(folder: Path) -> None:
        path = folder / MATH / "adapter_config.json"
        edit_json(path, lambda config: config.update(fields))

    return sabotage


def lose_half_an_adapter(folder: Path) -> None:
    """The B matrix of one layer is gone from the math module."""
    path = folder / MATH / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    save_file(tensors, path)
    record_anew(folder)


def set_record(**changes: Any) -> Sabotage:
    """The math module's tuning record says something else."""

    def sabotage(folder: Path) -> None:
        record_anew(folder, **changes)

    return sabotage


def another_modules_record(folder: Path) -> None:
    """The math module with the record of the module for code."""
    other = folder / "prefill/code/records/tuning.json"
    (folder / MATH / "records" / "tuning.json").write_text(other.read_text())


def lose_record(folder: Path) -> None:
    """The math module has no tuning record."""
    (folder / MATH / "records" / "tuning.json").unlink()


def set_entry(**fields: Any) -> Sabotage:
    """The manifest says something else of the math module."""

    def sabotage(folder: Path) -> None:
        modules = read_bundle(folder).manifest.prefill
        changed = (PrefillModule(**(vars(modules[0]) | fields)), *modules[1:])
        seal(folder, prefill=changed)

    return sabotage


def full_ft(folder: Path) -> None:
    """The math module is a plainly fine-tuned model, as its record and the manifest say."""
    record_anew(folder, system="full-ft")
    set_entry(system="full-ft")(folder)


def set_manifest(**fields: Any) -> Sabotage:
    """The manifest says something else of the bundle."""

    def sabotage(folder: Path) -> None:
        seal(folder, **fields)

    return sabotage


def set_layout(**fields: Any) -> Sabotage:
    """The manifest promises another KV layout."""

    def sabotage(folder: Path) -> None:
        seal(folder, kv_layout=read_bundle(folder).manifest.kv_layout | fields)

    return sabotage


def set_option(worker: str, option: str, value: str) -> Sabotage:
    """A worker's option has another value, or is added."""

    def sabotage(folder: Path) -> None:
        def change(launch: dict[str, Any]) -> None:
            found = next(one for one in launch["workers"] if one["name"] == worker)
            arguments = found["arguments"]
            if option in arguments:
                arguments[arguments.index(option) + 1] = value
            else:
                arguments += [option, value]

        edit_json(folder / LAUNCH_SPEC, change)

    return sabotage


def swap_adapters(folder: Path) -> None:
    """The prefill worker serves each task by the other one's adapter."""

    def change(launch: dict[str, Any]) -> None:
        arguments = launch["workers"][0]["arguments"]
        arguments[-2:] = ["math=../prefill/code", "code=../prefill/math"]

    edit_json(folder / LAUNCH_SPEC, change)


def lose_worker(folder: Path) -> None:
    """No worker decodes."""
    edit_json(folder / LAUNCH_SPEC, lambda launch: launch["workers"].pop())


def lose_launch_file(folder: Path) -> None:
    """There is no launch file."""
    (folder / LAUNCH_SPEC).unlink()


def swap_ids(part: str, one: str, other: str) -> Sabotage:
    """Two entries of a vocabulary change places, as special tokens too where they are such."""

    def sabotage(folder: Path) -> None:
        def change(tokenizer: dict[str, Any]) -> None:
            ids = tokenizer["model"]["vocab"]
            ids[one], ids[other] = ids[other], ids[one]
            for token in tokenizer["added_tokens"]:
                token["id"] = ids[token["content"]]

        edit_json(folder / part / "tokenizer.json", change)

    return sabotage


def reorder_special_tokens(part: str) -> Sabotage:
    """The tokens that begin and end a turn have each other's ids."""
    return swap_ids(part, SPECIAL[1], SPECIAL[2])


def set_tokenizer(part: str, **fields: Any) -> Sabotage:
    """Another section of a tokenizer.json."""

    def sabotage(folder: Path) -> None:
        edit_json(folder / part / "tokenizer.json", lambda tokenizer: tokenizer.update(fields))

    return sabotage


def set_tokenizer_config(part: str, **fields: Any) -> Sabotage:
    """Other fields in a tokenizer_config.json."""

    def sabotage(folder: Path) -> None:
        edit_json(folder / part / "tokenizer_config.json", lambda config: config.update(fields))

    return sabotage


def other_chat_template(part: str) -> Sabotage:
    """A chat template that says `bot` for `assistant`."""

    def sabotage(folder: Path) -> None:
        path = folder / part / "chat_template.jinja"
        path.write_text(path.read_text().replace("assistant", "bot"))

    return sabotage


def flip_byte(name: str, place: float = 0.9) -> Sabotage:
    """One byte of a file, at this share of its length, has another value."""

    def sabotage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * place)] ^= 1
        (folder / name).write_bytes(content)

    return sabotage


def truncate(name: str, lost_bytes: int = 100) -> Sabotage:
    """The end of a file is missing."""

    def sabotage(folder: Path) -> None:
        path = folder / name
        os.truncate(path, path.stat().st_size - lost_bytes)

    return sabotage


def shard(part: str) -> Sabotage:
    """A checkpoint in two shards with an index: no sabotage yet."""

    def sabotage(folder: Path) -> None:
        single = folder / part / "model.safetensors"
        tensors = load_file(single)
        names = sorted(tensors)
        places = dict(enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1))
        weight_map: dict[str, str] = {}
        for number, own in places.items():
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in own}, folder / part / file)
            weight_map |= dict.fromkeys(own, file)
        single.unlink()
        write_json(folder / part / "model.safetensors.index.json", {"weight_map": weight_map})

    return sabotage


def lose_shard(part: str) -> Sabotage:
    """One of a checkpoint's two shards is gone."""

    def sabotage(folder: Path) -> None:
        shard(part)(folder)
        (folder / part / "model-00002-of-00002.safetensors").unlink()

    return sabotage


def stale_index(part: str) -> Sabotage:
    """An index that says a tensor lies in the other shard."""

    def sabotage(folder: Path) -> None:
        shard(part)(folder)

        def change(index: dict[str, Any]) -> None:
            first = min(index["weight_map"])
            index["weight_map"][first] = "model-00002-of-00002.safetensors"

        edit_json(folder / part / "model.safetensors.index.json", change)

    return sabotage


def lose_tensor(part: str, name: str) -> Sabotage:
    """A checkpoint without one of its tensors."""

    def sabotage(folder: Path) -> None:
        path = folder / part / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path)

    return sabotage


def add_tensor(part: str, name: str, shape: tuple[int, ...]) -> Sabotage:
    """A checkpoint with a tensor too many, such as a bias."""

    def sabotage(folder: Path) -> None:
        path = folder / part / "model.safetensors"
        save_file(load_file(path) | {name: torch.zeros(shape)}, path)

    return sabotage


def other_base_copy(folder: Path) -> None:
    """The base checkpoint that the adapters are put on has other weights than its origin."""
    tiny_model(folder / BASE, seed=7)


def chain(*parts: Sabotage) -> Sabotage:
    """Several together."""

    def sabotage(folder: Path) -> None:
        for part in parts:
            part(folder)

    return sabotage


def set_file(name: str, content: bytes = b"{}") -> Sabotage:
    """A file with other content, or one that was not there."""

    def sabotage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return sabotage


def add_pickle(name: str = "decode/pytorch_model.bin") -> Sabotage:
    """Weights as a pickle."""
    return set_file(name, pickle.dumps({"weights": [1.0]}))


def leave_by_link(name: str = "decode/extra.json") -> Sabotage:
    """A link to a file beside the bundle."""

    def sabotage(folder: Path) -> None:
        outside = folder.parent / "outside.json"
        outside.write_text("{}")
        (folder / name).symlink_to(outside)

    return sabotage


def leave_by_linked_folder(folder: Path) -> None:
    """The base checkpoint lies elsewhere, behind a link."""
    (folder / BASE).rename(folder.parent / "elsewhere")
    (folder / BASE).symlink_to(folder.parent / "elsewhere")


def list_file_outside(folder: Path) -> None:
    """The manifest lists a file beside the bundle, with its right digest."""
    outside = folder.parent / "outside.json"
    outside.write_text("{}")
    files = read_bundle(folder).manifest.files | {"../outside.json": sha256_file(outside)}
    write_manifest(folder, replace(read_bundle(folder).manifest, files=files))
