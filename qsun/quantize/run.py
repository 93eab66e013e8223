"""Engine llmcompressor: measure the base model, smooth, round, write, and say what it cost."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qsun.checkpoint_files import Tensors
from qsun.decode_checkpoint import DecodeCheckpoint, load_dequantized
from qsun.models import load_model, load_tokenizer, on_accelerator, serving_dtype
from qsun.progress import announce, track
from qsun.quantize.awq import Smoothed, apply_awq
from qsun.quantize.grid import quantized_layer
from qsun.quantize.layer_error import output_error, sample_inputs
from qsun.quantize.outcome import LayerResult, Quantization, tensor_bytes
from qsun.quantize.perplexity import perplexity
from qsun.quantize.plan import Plan
from qsun.quantize.write import check_written, write_checkpoint
from qsun.rounding import round_to_nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantize(
    base: Path,
    config: Mapping[str, Any],
    plan: Plan,
    texts: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]],
    grid_points: int,
    out: Path,
) -> Quantization:
    """Quantize the checkpoint in `base` and write the decode module to `out`."""
    names = [layer.name for layer in plan.layers]
    dtype = serving_dtype(config)
    model = load_model(base, dtype)
    announce("measuring the base model")
    with on_accelerator(model):
        full = perplexity(model, heldout, "perplexity, full precision")
        inputs = sample_inputs(model, names, texts)
        rtn_errors = _round_all(model, plan, inputs)
        rounded = perplexity(model, heldout, "perplexity, round-to-nearest")
        _restore(model, base, names)

    announce(f"AWQ over {len(texts)} samples")
    tokenizer = load_tokenizer(base)
    start = time.monotonic()
    smoothed = apply_awq(model, tokenizer, plan, texts, grid_points)
    search_s = time.monotonic() - start
    layers = _layer_results(model, base, plan, smoothed, inputs, rtn_errors)
    del inputs
    write_checkpoint(model, tokenizer, plan, out)
    del model
    gc.collect()

    announce("reading the checkpoint back")
    with DecodeCheckpoint(out) as checkpoint:
        check_written(checkpoint.layers(), {layer.name: layer.sha256 for layer in layers})
        layer_bytes = checkpoint.layer_bytes()
    written = load_dequantized(out)
    with on_accelerator(written, last_use=True):
        quantized = perplexity(written, heldout, "perplexity, quantized")
    return Quantization(
        layers=layers,
        smoothing=[asdict(gain) for gain in smoothed.gains],
        perplexity={"full_precision": full, "round_to_nearest": rounded, "quantized": quantized},
        layer_bytes=layer_bytes,
        layer_bytes_full_precision=plan.weight_count * 2,
        checkpoint_bytes=tensor_bytes(out),
        base_bytes=tensor_bytes(base),
        search_s=search_s,
    )


def _round_all(
    model: PreTrainedModel, plan: Plan, inputs: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    from compressed_tensors.quantization import QuantizationArgs

    arguments = QuantizationArgs(**plan.arguments)
    modules = dict(model.named_modules())
    errors = {}
    for layer in track(plan.layers, "round-to-nearest", len(plan.layers)):
        weight = modules[layer.name].weight
        rounded = round_to_nearest(weight, arguments)
        errors[layer.name] = output_error(inputs[layer.name], weight, rounded)
        weight.data = rounded
    return errors


def _restore(model: PreTrainedModel, base: Path, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    for name in names:
        modules[name].weight.data.copy_(_tensor(base, f"{name}.weight"))


def _tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor; its file is mapped no longer than that, or its pages would count as memory."""
    with Tensors(folder) as tensors:
        return tensors[name]


def _layer_results(
    model: PreTrainedModel,
    base: Path,
    plan: Plan,
    smoothed: Smoothed,
    inputs: Mapping[str, torch.Tensor],
    rtn_errors: Mapping[str, float],
) -> list[LayerResult]:
    modules = dict(model.named_modules())
    results = []
    for layer in track(plan.layers, "layer errors", len(plan.layers)):
        written = quantized_layer(layer.name, modules[layer.name])
        stand_in = smoothed.undo(layer.name, written.weight())
        original = _tensor(base, f"{layer.name}.weight")
        results.append(
            LayerResult(
                name=layer.name,
                bits=plan.bits,
                stored_bits=plan.scheme.stored_of(layer.name),
                group_size=plan.group_size,
                rtn_error=rtn_errors[layer.name],
                error=output_error(inputs[layer.name], original, stand_in),
                sha256=written.digest(),
            )
        )
    return results
