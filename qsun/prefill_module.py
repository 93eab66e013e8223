"""A prefill module on disk: a full checkpoint, or a LoRA adapter on the base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
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
# What an adapter's config may say without changing what its two factors mean; all else may.
UNDERSTOOD = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
        *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping"),
        *("base_model_name_or_path", "revision", "layers_to_transform", "layers_pattern"),
        *("megatron_core", "qalora_group_size", "init_lora_weights", "eva_config"),
        *("ensure_weight_tying", "bias"),
    }
)
# Starts of training that leave the base model as it is; others hide a change of it.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false")
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


def other_ranks(adapter: Mapping[str, tuple[int, ...]], rank: int) -> list[str]:
    """The adapter's tensors, by name and shape, that are of another rank than its config says."""
    return [
        f"{name}: shape {list(shape)}, rank {rank} in {ADAPTER_CONFIG}"
        for name, shape in adapter.items()
        if shape[0 if ".lora_A." in name else 1] != rank
    ]


def check_plain_lora(folder: Path, base: Mapping[str, tuple[int, ...]]) -> float:
    """What B A is multiplied by in an adapter on tensors of these shapes; no weight is read.

    Raises:
        ModelError: no LoRA adapter, more than two plain factors a layer, or not of this model.
    """
    config = adapter_config(folder)
    beyond = [
        f"{key} {value!r}"
        for key, value in config.items()
        if key not in UNDERSTOOD and value and value != "none"
    ]
    if config.get("bias", "none") != "none":
        beyond.append(f"bias {config['bias']!r}")
    if str(config.get("init_lora_weights", True)).lower() not in PLAIN_STARTS:
        beyond.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if beyond:
        raise ModelError(f"{folder} uses {', '.join(beyond)}: qsun merges plain LoRA alone")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ModelError(f"{folder / ADAPTER_CONFIG} gives no rank r above 0 and no lora_alpha")
    shapes = _adapter_shapes(folder / ADAPTER_WEIGHTS)
    _refuse_misfits(folder, shapes, base)
    wrong = other_ranks(shapes, rank) or _halves(shapes)
    if wrong:
        raise ModelError(f"{folder} is no whole adapter:\n{bullet_list(wrong)}")
    return float(alpha) / rank


def _halves(adapter: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Factors whose other one is missing."""
    other = {"A": "B", "B": "A"}
    names = [found for found in map(LORA_NAME.fullmatch, adapter) if found]
    factors = {(found["layer"], found["side"]) for found in names}
    return [
        f"{layer}: lora_{other[side]} is missing"
        for layer, side in sorted(factors)
        if (layer, other[side]) not in factors
    ]


def _check_adapter(folder: Path, base: Path) -> None:
    """Refuse what peft would leave out with no more than a warning."""
    adapter_config(folder)
    _refuse_misfits(folder, _adapter_shapes(folder / ADAPTER_WEIGHTS), _shapes(base))


def _shapes(base: Path) -> dict[str, tuple[int, ...]]:
    with Tensors(base) as tensors:
        return {name: tensors.shape(name) for name in tensors.names()}


def _refuse_misfits(
    folder: Path, adapter: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]]
) -> None:
    misfits = adapter_misfits(adapter, base)
    if misfits:
        raise ModelError(
            f"{folder} was not trained on this base model: these tensors fit no layer of it:\n"
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


class PrefillTensors:
    """A prefill module's tensors by name, read one at a time; an adapter is merged into `base`.

    Raises:
        ModelError: as `load_prefill`, or an adapter that is more than two plain factors a layer.
    """

    def __init__(self, folder: Path | None, base: Path) -> None:
        self._stack = ExitStack()
        self._adapter: Any = None
        merged = folder is not None and (folder / ADAPTER_CONFIG).exists()
        if folder is not None and merged:
            self._open_adapter(folder, base)
        whole = base if folder is None or merged else folder
        check_checkpoint(whole)
        self._tensors = self._stack.enter_context(Tensors(whole))

    def _open_adapter(self, folder: Path, base: Path) -> None:
        from safetensors import safe_open

        self._scale = check_plain_lora(folder, _shapes(base))
        path = folder / ADAPTER_WEIGHTS
        self._adapter = self._stack.enter_context(safe_open(path, framework="pt"))
        self._adapted = {
            found["layer"] for found in map(LORA_NAME.fullmatch, self._adapter.keys()) if found
        }

    def __enter__(self) -> PrefillTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """All tensor names, sorted; none of an adapter's own."""
        return self._tensors.names()

    def __getitem__(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self._tensors[name]
        layer = name.removesuffix(".weight")
        if self._adapter is None or layer not in self._adapted:
            return weight
        first, second = (
            self._adapter.get_tensor(f"base_model.model.{layer}.lora_{side}.weight").float()
            for side in ("A", "B")
        )
        merged: torch.Tensor = weight.float() + self._scale * (second @ first)
        return merged.to(weight.dtype)
