"""A prefill module on disk: a full checkpoint, or a LoRA adapter on the base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qsun.checkpoint_files import Tensors, check_checkpoint
from qsun.errors import ModelError, bullet_list
from qsun.models import load_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LORA_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


def save_prefill(prefill: PreTrainedModel, folder: Path, dtype: torch.dtype, base: str) -> None:
    """Write the module as it will be served: as `dtype`, an adapter naming its `base`.

    What was trained is rounded to `dtype` in place.
    """
    from peft import PeftModel

    for weight in prefill.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    if isinstance(prefill, PeftModel):
        adapter = cast(Any, prefill.peft_config["default"])
        adapter.base_model_name_or_path = base
        adapter.target_modules = sorted(adapter.target_modules)
        prefill.save_pretrained(folder, save_embedding_layers=False)
    else:
        prefill.config.dtype = dtype
        prefill.save_pretrained(folder)
    for card in folder.glob("README.md"):
        card.unlink()  # peft's empty form: what there is to say is in the record


def load_prefill(folder: Path, base: Path, dtype: str) -> PreTrainedModel:
    """The frozen prefill module of a folder; an adapter is put on the checkpoint `base`.

    Raises:
        ModelError: no module, an adapter that is not LoRA, or one that fits no layer of `base`.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        check_checkpoint(folder)
        return load_model(folder, dtype)
    _check_adapter(folder, base)
    from peft import PeftModel

    module = PeftModel.from_pretrained(
        load_model(base, dtype), folder, autocast_adapter_dtype=False, use_safetensors=True
    )
    return cast("PreTrainedModel", module.eval().requires_grad_(False))


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's `adapter_config.json`.

    Raises:
        ModelError: unreadable, or of another kind than LoRA.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter: qsun reads LORA")
    return config


def adapter_misfits(
    adapter: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The adapter's tensors, by name and shape, that belong to no layer of `base`."""
    return [
        f"{name} {list(shape)}" for name, shape in adapter.items() if not _fits(name, shape, base)
    ]


def _check_adapter(folder: Path, base: Path) -> None:
    """Refuse what peft would leave out with no more than a warning."""
    adapter_config(folder)
    shapes = _adapter_shapes(folder / ADAPTER_WEIGHTS)
    with Tensors(base) as tensors:
        misfits = adapter_misfits(shapes, {name: tensors.shape(name) for name in tensors.names()})
    if misfits:
        raise ModelError(
            f"{folder} was not trained on {base}: these tensors fit no layer of it:\n"
            f"{bullet_list(misfits)}"
        )


def _adapter_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as adapter:
            names = list(adapter.keys())
            return {name: tuple(adapter.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _fits(name: str, shape: tuple[int, ...], base: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a LoRA tensor, A `[rank, in]` or B `[out, rank]`, belongs to a layer of `base`."""
    found = LORA_NAME.fullmatch(name)
    layer = () if found is None else base.get(f"{found['layer']}.weight", ())
    if found is None or len(layer) != 2 or len(shape) != 2:
        return False
    outputs, inputs = layer
    return shape[1] == inputs if found["side"] == "A" else shape[0] == outputs
