"""Bundles of tiny random models, complete: both formats, both kinds of prefill module."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

from qsun.bundle import MANIFEST, Manifest, PrefillModule, read_bundle, write_manifest
from qsun.checkpoint_files import read_config_file
from qsun.config import QuantizeConfig, VerifyConfig
from qsun.files import digest_folder, sha256_file, write_json
from qsun.kv_layout import kv_layout
from qsun.launch_spec import LAUNCH_SPEC, launch_spec
from qsun.models import load_model, load_tokenizer
from qsun.prefill_module import save_prefill
from qsun.quantize.plan import make_plan
from qsun.quantize.write import write_checkpoint
from qsun.quiet import hushed
from qsun.records import Record, new_record, package_versions
from qsun.scheme import scheme_of
from qsun.skeleton import skeleton
from qsun.verdict import VERDICT, Check, Outcome, Verdict
from tests.builders import Architecture, tiny_model, tiny_tokenizer
from tests.reference import with_adapter

Shape = Literal["llama-gqa", "llama-mha", "qwen3"]
Format = Literal["compressed-tensors", "awq"]
Module = Literal["lora", "full"]

SHAPES: dict[Shape, tuple[Architecture, int]] = {
    "llama-gqa": ("llama", 2),
    "llama-mha": ("llama", 4),
    "qwen3": ("qwen3", 2),
}
TASKS = ("math", "code")
BOUNDARY = "n-1"
SYSTEM = "qsun"
GROUP_SIZE = 32
RANK = 4  # of `with_adapter`
MAX_TOKENS = 256


def build_bundle(
    folder: Path,
    *,
    shape: Shape = "llama-gqa",
    tied: bool = True,
    format: Format = "compressed-tensors",
    module: Module = "lora",
) -> Path:
    """Write a bundle of one decode module and two prefill modules, `TASKS`; returns its folder."""
    architecture, kv_heads = SHAPES[shape]
    base = folder / "base"
    tiny_model(base, architecture, kv_heads=kv_heads, tied=tied)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    origin = {"model.safetensors": sha256_file(base / "model.safetensors")}
    write_decode(base, folder / "decode", format)
    Record("quantization", {}, 0, {"base": {"sha256": origin}}).write(
        folder / "decode" / "records" / "quantization.json"
    )
    for seed, task in enumerate(TASKS, start=1):
        prefill = folder / "prefill" / task
        if module == "lora":
            save_prefill(
                with_adapter(load_model(base, "bfloat16"), seed), prefill, torch.bfloat16, "../base"
            )
        else:
            tiny_model(prefill, architecture, seed=seed, kv_heads=kv_heads, tied=tied)
        write_tuning_record(prefill, module, origin)
    if module == "full":
        shutil.rmtree(base)
    finish(folder, module, origin)
    return folder


def write_decode(base: Path, folder: Path, format: Format) -> None:
    """Round the checkpoint `base` to 4 bits, to nearest and without a search, as `format`."""
    config = read_config_file(base / "config.json")
    settings = QuantizeConfig("", "", group_size=GROUP_SIZE, format=format)
    plan = make_plan(config, skeleton(config).linears, settings)
    model = load_model(base, "bfloat16")
    quantizer = QuantizationModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": plan.arguments}},
        ignore=list(plan.full_precision_layers),
    )
    with hushed():
        oneshot(model=model, recipe=[quantizer], pipeline="datafree")
    folder.mkdir()
    write_checkpoint(model, load_tokenizer(base), plan, folder)


def write_tuning_record(
    prefill: Path, module: Module, origin: dict[str, str], **changes: Any
) -> None:
    """Write the record of a prefill module that lies in `prefill`; `changes` are to its result."""
    (prefill / "records" / "tuning.json").unlink(missing_ok=True)
    result = {
        "system": SYSTEM,
        "module": module,
        "boundary": BOUNDARY,
        "base": {"model": "tiny", "revision": None, "sha256": origin},
        "files": digest_folder(prefill),
    }
    Record("tuning", {}, 0, result | changes).write(prefill / "records" / "tuning.json")


def finish(
    folder: Path,
    module: Module,
    origin: dict[str, str],
    tasks: Iterable[str] = TASKS,
    rank: int = RANK,
    max_tokens: int = MAX_TOKENS,
    digests: bool = True,
) -> None:
    """Write what goes over the modules: serving files and the manifest, with or without digests."""
    config = read_config_file(folder / "decode" / "config.json")
    manifest = Manifest(
        name="tiny",
        base={"model": "tiny", "revision": None, "sha256": origin},
        base_path="base" if module == "lora" else None,
        decode_path="decode",
        decode_scheme=str(scheme_of(config)),
        tokenizer_path="tokenizer",
        boundary=BOUNDARY,
        kv_layout=asdict(kv_layout(config)),
        kv_cache_dtype="auto",
        max_tokens=max_tokens,
        prefill=tuple(
            PrefillModule(
                task=task,
                path=f"prefill/{task}",
                module=module,
                system=SYSTEM,
                boundary=BOUNDARY,
                rank=rank if module == "lora" else None,
            )
            for task in tasks
        ),
        records=(),
        files={},
        versions=package_versions(),
    )
    (folder / LAUNCH_SPEC).parent.mkdir()
    write_json(folder / LAUNCH_SPEC, launch_spec(manifest, "cpu").summary())
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = digest_folder(folder) if digests else dict.fromkeys(names, "0" * 64)
    files.pop(MANIFEST, None)
    write_manifest(folder, Manifest(**{**vars(manifest), "files": files}))


def write_passed_verdict(folder: Path) -> None:
    """A verdict as `qsun verify` leaves it, where what it proves is tested elsewhere."""
    checks = tuple(
        Check(f"{level}.all", Outcome.PASSED, "everything", "agrees")
        for level in ("static", "numeric")
    )
    verdict = Verdict(read_bundle(folder).digest, checks)
    new_record("verdict", VerifyConfig(), 0, verdict.summary()).write(folder / VERDICT)
