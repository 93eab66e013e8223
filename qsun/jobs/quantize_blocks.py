"""Engine qsun: blocks are searched one after another and kept; then the checkpoint is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qsun.calibrate.samples import Sample, SampleSet
from qsun.checkpoint_files import Tensors, read_config_file
from qsun.decode_checkpoint import DecodeCheckpoint, QuantizedLayer
from qsun.decode_recipe import weight_settings
from qsun.errors import DataError
from qsun.files import disk_full_is_an_os_error
from qsun.gemm_checkpoint import write_gemm
from qsun.jobs.block_walk import BlockWalk, search_devices
from qsun.jobs.evaluation_state import digest_of
from qsun.jobs.measuring import Measuring
from qsun.jobs.prepare import Prepared
from qsun.jobs.search_state import KeptBlock, SearchState
from qsun.models import fingerprint, load_tokenizer, serving_dtype
from qsun.packed_checkpoint import write_packed
from qsun.progress import announce, bar
from qsun.quantize.block_search import BlockFound
from qsun.quantize.outcome import LayerResult, Quantization, tensor_bytes
from qsun.quantize.write import check_written
from qsun.records import hardware

HEAD = "lm_head.weight"


def open_state(prepared: Prepared, base: Path, calibration: SampleSet, resume: bool) -> SearchState:
    """Where finished blocks are kept, for this search alone: all that its codes depend on.

    Raises:
        QsunError: as `SearchState`.
    """
    identity = {
        "base": fingerprint(prepared.source, base),
        "config": prepared.model_config,
        "calibration": {
            "sha256": calibration.digest,
            "sources": [count.name for count in calibration.counts],
        },
        "prefill": {task: digest_of(folder) for task, folder in prepared.prefill.items()},
        "settings": weight_settings(asdict(prepared.settings)),
        "seed": prepared.run.seed,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "hardware": {
            **hardware(),
            "threads": torch.get_num_threads(),
            "devices": len(search_devices()),
        },
    }
    return SearchState(prepared.out, identity, resume, prepared.settings.search.keep_every_s)


def quantize_by_blocks(
    prepared: Prepared,
    base: Path,
    calibration: SampleSet,
    heldout: SampleSet,
    state: SearchState,
    out: Path,
) -> Quantization:
    """Quantize the checkpoint in `base` into `state` and write the decode module to `out`.

    Raises:
        DataError: no sample is left that a decode module would answer.
    """
    samples = searched_samples(prepared, calibration)
    measuring = Measuring(prepared, heldout, state)
    measuring.base(base)
    announce(f"searching, over {len(samples)} samples")
    start = time.monotonic()
    search_blocks(prepared, base, samples, state)
    search_s = time.monotonic() - start
    blocks = int(prepared.model_config["num_hidden_layers"])
    _write(prepared, base, state, blocks, out)
    layers, gains, stages = [], [], []
    for kept in state.blocks(blocks):
        layers += [_result(layer, kept.report, prepared) for layer in kept.layers]
        gains += kept.report["gains"]
        stages += kept.report["stages"]
    announce("reading the checkpoint back")
    with DecodeCheckpoint(out) as checkpoint:
        check_written(checkpoint.layers(), {layer.name: layer.sha256 for layer in layers})
        layer_bytes = checkpoint.layer_bytes()
    return Quantization(
        layers=layers,
        smoothing=gains,
        perplexity=measuring.quantized(out),
        layer_bytes=layer_bytes,
        layer_bytes_full_precision=prepared.plan.weight_count * 2,
        checkpoint_bytes=tensor_bytes(out),
        base_bytes=tensor_bytes(base),
        search_s=search_s,
        stages=stages,
    )


def search_blocks(
    prepared: Prepared, base: Path, samples: Sequence[Sample], state: SearchState
) -> None:
    """Quantize every block into `state`, going on from where it stands."""
    blocks = int(prepared.model_config["num_hidden_layers"])
    with (
        state.shelf(prepared.estimate.streams_on_disk) as shelf,
        BlockWalk(prepared, base, samples, shelf, search_devices()) as walk,
        bar("blocks", blocks) as shown,
    ):
        before = state.streams()
        if before is not None:
            walk.lanes.restore(before.tensors)
            shown.update(before.block)
        for index in range(0 if before is None else before.block, blocks):
            state.keep_block(index, _kept(walk.quantize(index)))
            if index + 1 < blocks:
                walk.advance()
                state.keep_streams(index + 1, walk.lanes.store)
            shown.update(1)


def searched_samples(prepared: Prepared, calibration: SampleSet) -> Sequence[Sample]:
    """The samples that the search reads.

    Raises:
        DataError: no sample is left that a decode module would answer.
    """
    samples = calibration.samples
    if prepared.settings.search.positions == "responses":
        return _served(samples, prepared.calibration.max_tokens)
    return samples


def _served(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    served = [one for one in samples if one.is_served]
    without = {one.source for one in samples} - {one.source for one in served}
    if without:
        raise DataError(
            f"no sample of {', '.join(sorted(without))} keeps a response within max_tokens "
            f"{max_tokens}: raise it, or set quantize.search.positions to all"
        )
    return served


def _kept(found: BlockFound) -> KeptBlock:
    report: dict[str, Any] = {
        "errors": {one.layer.name: one.error for one in found.layers},
        "rounded_errors": {one.layer.name: one.rounded_error for one in found.layers},
        "gains": [asdict(gain) for gain in found.gains],
        "stages": [asdict(one.stage) for one in found.diagnoses],
        "numbers": {
            name: asdict(numbers) for one in found.diagnoses for name, numbers in one.layers.items()
        },
    }
    return KeptBlock([one.layer for one in found.layers], found.others, report)


def _result(layer: QuantizedLayer, report: dict[str, Any], prepared: Prepared) -> LayerResult:
    return LayerResult(
        name=layer.name,
        bits=prepared.plan.scheme.bits_of(layer.name),
        stored_bits=prepared.plan.scheme.stored_of(layer.name),
        group_size=prepared.plan.group_size,
        rtn_error=report["rounded_errors"][layer.name],
        error=report["errors"][layer.name],
        sha256=layer.digest(),
        numbers=report["numbers"][layer.name],
    )


def _write(prepared: Prepared, base: Path, state: SearchState, blocks: int, out: Path) -> None:
    from transformers import GenerationConfig

    plan, dtype = prepared.plan, serving_dtype(prepared.model_config)
    config = {**read_config_file(base / "config.json"), "dtype": dtype}
    others = _others(prepared, base, state, blocks)
    layers = (layer for kept in state.blocks(blocks) for layer in kept.layers)
    kept_whole = plan.full_precision_layers
    with disk_full_is_an_os_error():
        if plan.format == "awq":
            write_gemm(dict(others), layers, config, plan.scheme, kept_whole, out)
        else:
            write_packed(others, layers, config, plan.scheme, kept_whole, out)
        load_tokenizer(base).save_pretrained(out)
        if (base / "generation_config.json").exists():
            GenerationConfig.from_pretrained(base).save_pretrained(out)


def _others(
    prepared: Prepared, base: Path, state: SearchState, blocks: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of no quantized layer, as smoothing left them, one in memory at a time."""
    dtype = getattr(torch, serving_dtype(prepared.model_config))
    changed = {name: one for kept in state.blocks(blocks) for name, one in kept.others.items()}
    quantized = {f"{layer.name}.weight" for layer in prepared.plan.layers}
    tied = {HEAD} if prepared.model_config.get("tie_word_embeddings") else set()
    with Tensors(base) as tensors:
        for name in tensors.names():
            if name not in quantized | tied:
                yield name, changed.get(name, tensors[name]).to(dtype)
