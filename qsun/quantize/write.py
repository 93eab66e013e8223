"""Writing a quantized model: a Hugging Face folder in either format, complete with tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qsun.decode_checkpoint import QuantizedLayer
from qsun.errors import bullet_list
from qsun.files import disk_full_is_an_os_error
from qsun.gemm_checkpoint import write_gemm
from qsun.packed_checkpoint import write_packed
from qsun.quantize.grid import quantized_layer
from qsun.quantize.plan import Plan
from qsun.quiet import hushed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, folder: Path
) -> None:
    """Write the model that `apply_awq` prepared; the model is of no further use afterwards."""
    model.config._name_or_path = ""
    with disk_full_is_an_os_error(), hushed():
        if plan.format == "awq" or plan.stored_bits is not None:
            _write_layers(model, plan, folder)
        else:
            model.save_pretrained(folder, save_compressed=True)
            (folder / "recipe.yaml").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    _empty(model)


def _empty(model: PreTrainedModel) -> None:
    """Free the weights: llm-compressor keeps the module itself alive after its run."""
    from compressed_tensors.offload import disable_onloading

    with disable_onloading():
        for module in model.modules():
            module._parameters.clear()
            module._buffers.clear()


def _write_layers(model: PreTrainedModel, plan: Plan, folder: Path) -> None:
    modules = dict(model.named_modules())
    planned = {layer.name for layer in plan.layers}
    others = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name.rpartition(".")[0] in planned and not name.endswith(".bias"))
    }
    if model.config.tie_word_embeddings:
        others.pop("lm_head.weight", None)
    layers = (quantized_layer(layer.name, modules[layer.name]) for layer in plan.layers)
    whole = plan.full_precision_layers
    if plan.format == "awq":
        write_gemm(others, layers, model.config.to_dict(), plan.scheme, whole, folder)
    else:
        config = json.loads(model.config.to_json_string(use_diff=False))
        write_packed(others.items(), layers, config, plan.scheme, whole, folder)


def check_written(checkpoint_layers: Iterator[QuantizedLayer], digests: Mapping[str, str]) -> None:
    """Compare what lies on disk with what was quantized, code by code.

    Raises:
        RuntimeError: a layer is missing or differs.
    """
    found = {layer.name: layer.digest() for layer in checkpoint_layers}
    wrong = [name for name in digests if found.get(name) != digests[name]]
    wrong += [name for name in found if name not in digests]
    if wrong:
        raise RuntimeError(f"written layers differ from those quantized:\n{bullet_list(wrong)}")
