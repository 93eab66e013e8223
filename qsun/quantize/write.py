"""Writing a quantized model: a Hugging Face folder in either format, complete with tokenizer."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qsun.autoawq import pack
from qsun.decode_checkpoint import QuantizedLayer
from qsun.errors import PlanError, bullet_list
from qsun.files import write_json
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
    with _disk_full_is_an_os_error(), hushed():
        if plan.format == "awq":
            _write_gemm(model, plan, folder)
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


def _write_gemm(model: PreTrainedModel, plan: Plan, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    modules = dict(model.named_modules())
    planned = {layer.name for layer in plan.layers}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name.rpartition(".")[0] in planned and not name.endswith(".bias"))
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for layer in plan.layers:
        state |= gemm_tensors(quantized_layer(layer.name, modules[layer.name]))
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    # transformers would read a quantization_config of its own making; this one is AutoAWQ's.
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    write_json(
        folder / "config.json",
        _json_ready(config)
        | {
            "quantization_config": {
                "quant_method": "awq",
                "version": "gemm",
                "bits": plan.bits,
                "group_size": plan.group_size,
                "zero_point": True,
                "modules_to_not_convert": list(plan.full_precision_layers),
            }
        },
    )


def gemm_tensors(layer: QuantizedLayer) -> dict[str, torch.Tensor]:
    """A layer as AutoAWQ's three tensors.

    Raises:
        PlanError: a scale that float16, the only dtype of this layout, cannot hold exactly.
    """
    scales = layer.scales.to(torch.float16)
    inexact = (scales.float() != layer.scales.float()).sum().item()
    if inexact:
        raise PlanError(
            f"{layer.name}: format awq stores scales as float16, and {inexact} of this layer's "
            "do not fit it exactly; use format compressed-tensors"
        )
    return {
        f"{layer.name}.qweight": pack(layer.codes.t() + 8),
        f"{layer.name}.qzeros": pack(layer.zeros.t() + 8),
        f"{layer.name}.scales": scales.t().contiguous(),
    }


def _json_ready(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(config, default=str)))


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


@contextmanager
def _disk_full_is_an_os_error() -> Iterator[None]:
    """Both safetensors and tokenizers report a full disk as errors of their own, by text alone."""
    try:
        yield
    except Exception as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "no space left on device") from error
        raise
