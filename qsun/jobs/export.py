"""The export job: decode module, prefill modules and tokenizer become one bundle.

config -> modules checked against the base model -> references of each task -> copies -> losses
through the hand-off -> serving files, model card -> manifest. Nothing is published before the last.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qsun import __version__
from qsun.bundle import Manifest, PrefillModule, write_manifest
from qsun.checkpoint_files import read_config_file
from qsun.decode_recipe import QUANTIZATION
from qsun.errors import ConfigError, DataError
from qsun.files import digest_folder, link_or_copy, publish_folder, write_json
from qsun.jobs.prepare_export import TUNING, Chosen, PreparedExport
from qsun.kv_layout import kv_layout
from qsun.launch_spec import launch_spec
from qsun.models import (
    ModelSource,
    checkpoint_folder,
    fingerprint,
    load_model,
    load_tokenizer,
    on_accelerator,
    serving_dtype,
)
from qsun.prefill_module import ADAPTER_CONFIG, load_prefill
from qsun.progress import announce
from qsun.records import PICTURE, REPORT, new_record, package_versions
from qsun.references import Reference, read_references, write_references
from qsun.scheme import scheme_of
from qsun.skeleton import skeleton

BASE, DECODE, TOKENIZER = "base", "decode", "tokenizer"
# vLLM wants a config.json beside a tokenizer, or logs errors while it looks for one.
TOKENIZER_FILES = (
    *("config.json", "tokenizer*", "special_tokens_map.json"),
    *("chat_template*", "vocab*", "merges*"),
)
LEFT_OUT = shutil.ignore_patterns("logs", "checkpoint-*", "records")


def run_export(prepared: PreparedExport) -> dict[str, Any]:
    """Write the bundle and publish it; returns the manifest as plain values.

    Raises:
        QsunError: nothing was published.
    """
    announce("reading the tasks' references")
    with publish_folder(prepared.out) as scratch, tempfile.TemporaryDirectory() as temporary:
        shape, dtype = skeleton(prepared.model_config), serving_dtype(prepared.model_config)
        announce("opening the base model")
        opened = checkpoint_folder(prepared.source, shape, Path(temporary), dtype)
        _write_tokenizer(opened, scratch / TOKENIZER)
        adapters = any(one.adapter is not None for one in prepared.chosen)
        if adapters:
            _put(prepared, opened, scratch / BASE)
        _write_decode(prepared, scratch / DECODE)
        modules = [_write_prefill(prepared, one, scratch) for one in prepared.chosen]
        for one in prepared.chosen:
            _write_references(prepared, one, scratch)
        manifest = _manifest(prepared, opened, scratch, tuple(modules), BASE if adapters else None)
        launch_spec(manifest, "cpu")  # refuses what vLLM could not serve
        announce("measuring each module through the hand-off")
        measured = tuple(_measured(modules, opened, dtype, scratch))
        manifest = replace(manifest, prefill=measured)
        _publish_last(prepared, manifest, scratch)
    return asdict(manifest)


def _put(prepared: PreparedExport, module: Path, folder: Path) -> None:
    """A module's files, without what was left beside them while it was made."""
    put = link_or_copy if prepared.settings.link else shutil.copy2
    shutil.copytree(module, folder, ignore=LEFT_OUT, copy_function=put)


def _write_tokenizer(base: Path, folder: Path) -> None:
    folder.mkdir()
    for pattern in TOKENIZER_FILES:
        for path in base.glob(pattern):
            shutil.copy(path, folder / path.name)
    load_tokenizer(folder)  # refuses what cannot be read alone


def _write_decode(prepared: PreparedExport, folder: Path) -> None:
    from qsun.gemm_checkpoint import rewrite_as_gemm

    scheme = scheme_of(read_config_file(prepared.decode / "config.json"))
    if prepared.format is None or (scheme is not None and scheme.format == prepared.format):
        _put(prepared, prepared.decode, folder)
    elif prepared.format == "awq" and scheme is not None:
        announce("rewriting the decode module in AutoAWQ's layout")
        folder.mkdir()
        rewrite_as_gemm(prepared.decode, folder)
        shutil.rmtree(folder / "records", ignore_errors=True)
    else:
        raise ConfigError(
            f"--format {prepared.format}: {prepared.decode} is {scheme or 'not quantized'}; "
            "quantize it in that format"
        )
    for name in (QUANTIZATION, REPORT, PICTURE):
        if (prepared.decode / name).exists():
            target = folder.parent / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(prepared.decode / name, target)


def _write_prefill(prepared: PreparedExport, one: Chosen, scratch: Path) -> PrefillModule:
    path = f"prefill/{one.task.name}"
    _put(prepared, one.folder, scratch / path)
    if one.adapter is not None:
        named = {"base_model_name_or_path": prepared.run.base.model}
        write_json(scratch / path / ADAPTER_CONFIG, dict(one.adapter) | named)
    if one.record is not None:
        (scratch / path / TUNING).parent.mkdir()
        shutil.copy(one.folder / TUNING, scratch / path / TUNING)
    return PrefillModule(
        task=one.task.name,
        path=path,
        module="full" if one.adapter is None else "lora",
        system=None if one.record is None else str(one.record["system"]),
        boundary=one.boundary,
        rank=None if one.adapter is None else int(one.adapter["r"]),
        licences={
            source.name: source.licence for source in one.task.train if source.licence is not None
        },
    )


def _write_references(prepared: PreparedExport, one: Chosen, scratch: Path) -> None:
    from qsun.tasks.examples import read_validation
    from qsun.tune.batches import encode_examples

    tokenizer = load_tokenizer(scratch / TOKENIZER)
    examples = read_validation(one.task, one.definition.parent)
    task = one.task
    rows = encode_examples(examples, tokenizer, task.max_tokens, f"{task.name} validation").rows
    settings = prepared.settings
    short = [row for row in rows if len(row) <= settings.reference_tokens]
    if not short:
        raise DataError(
            f"task {task.name}: no validation row has {settings.reference_tokens} tokens or fewer: "
            "raise export.reference_tokens"
        )
    references = [Reference(row.prompt, row.response) for row in short[: settings.references]]
    write_references(scratch / f"verification/{task.name}.jsonl", references)
    # What `qsun evaluate` asks: a task is named by its definition's file.
    shutil.copy(one.definition, scratch / f"verification/{task.name}.yaml")


def _measured(
    modules: list[PrefillModule], base: Path, dtype: str, scratch: Path
) -> list[PrefillModule]:
    from qsun.handoff import Boundary
    from qsun.verify.numeric.hand_off_drift import hand_off_drift

    model, found = load_model(base, dtype), []
    with on_accelerator(model, last_use=True, models=2):
        for module in modules:
            path = scratch / f"verification/{module.task}.jsonl"
            references = read_references(path, model.config.vocab_size)
            boundary = Boundary(module.boundary)
            prefill = load_prefill(scratch / module.path, base, dtype).to(model.device)
            loss, _ = hand_off_drift(prefill, model, [], references, boundary)
            alone, _ = hand_off_drift(model, model, [], references, boundary)
            found.append(replace(module, reference_loss=loss, base_loss=alone))
            del prefill
    return found


def _manifest(
    prepared: PreparedExport,
    base: Path,
    scratch: Path,
    modules: tuple[PrefillModule, ...],
    base_path: str | None,
) -> Manifest:
    config = read_config_file(scratch / DECODE / "config.json")
    scheme, layout = scheme_of(config), kv_layout(config)
    digests = fingerprint(prepared.source, base) | fingerprint(ModelSource(folder=base), base)
    return Manifest(
        name=prepared.run.name,
        base={
            "model": prepared.run.base.model,
            "revision": prepared.run.base.revision,
            "sha256": digests,
        },
        base_path=base_path,
        decode_path=DECODE,
        decode_scheme=layout.dtype if scheme is None else str(scheme),
        tokenizer_path=TOKENIZER,
        boundary=modules[0].boundary,
        kv_layout=json.loads(json.dumps(asdict(layout))),
        kv_cache_dtype="auto",
        max_tokens=prepared.settings.max_tokens or layout.max_tokens,
        prefill=modules,
        records=(),
        files={},
        versions={"qsun": __version__} | package_versions(),
        decode_batch=prepared.settings.decode_batch,
    )


def _publish_last(prepared: PreparedExport, manifest: Manifest, scratch: Path) -> None:
    """Serving files, card and the export's record, then the manifest, which lists them all."""
    from qsun.export.model_card import write_model_card
    from qsun.export.serving_files import write_serving_files

    record = new_record(
        "export",
        prepared.run,
        prepared.run.seed,
        {"format": prepared.format, "prefill": [asdict(module) for module in manifest.prefill]},
    )
    record.write(scratch / "records" / "export.json")
    records = sorted(
        path.relative_to(scratch).as_posix() for path in scratch.rglob("records/*.json")
    )
    described = replace(
        manifest,
        records=tuple(records),
        created=record.created,
        files=digest_folder(scratch),
    )
    write_serving_files(scratch, described)
    write_model_card(scratch, described, prepared.settings.licence)
    write_manifest(scratch, replace(described, files=digest_folder(scratch)))
