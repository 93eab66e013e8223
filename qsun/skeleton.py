"""The skeleton: a model's layers and tensor shapes, worked out from its config without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.checkpoint_files import Tensors
from qsun.errors import ModelError, bullet_list

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "vocab_size",
)
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # written by old versions, worked out anew by all


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of a model: its weight is `[out_features, in_features]`."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Skeleton:
    """A model's linear layers in order, its parameter count, and its tensors' shapes by name.

    `tied` names the tensors that share another's values: counted once, often not stored.
    """

    linears: tuple[LinearShape, ...]
    parameters: int
    tensors: dict[str, tuple[int, ...]]
    tied: frozenset[str]


def transformers_config(config: Mapping[str, Any], **changes: Any) -> PretrainedConfig:
    """The transformers configuration object of a `config.json` mapping, with `changes` applied.

    Raises:
        ModelError: a model type transformers does not have, or fields it rejects.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    settings = {key: value for key, value in config.items() if key != "model_type"} | changes
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ModelError(f"transformers {version('transformers')} has no model type {model_type!r}")
    wrong = [
        f"{field}: {config.get(field)!r} must be a whole number above 0"
        for field in SHAPE_FIELDS
        if not isinstance(config.get(field), int) or config[field] < 1
    ]
    if wrong:
        raise ModelError(f"the model's config.json does not give its shape:\n{bullet_list(wrong)}")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"transformers rejects this model config: {error}") from error


def skeleton(config: Mapping[str, Any]) -> Skeleton:
    """The shapes of the model that `config` describes, worked out without any weights.

    Raises:
        ModelError: the config describes no possible model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = transformers_config(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"no model can be made from this config: {error}") from error
    linears = tuple(
        LinearShape(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = frozenset(shapes) - {name for name, _ in model.named_parameters()}
    return Skeleton(linears, model.num_parameters(), shapes, tied)


def check_tensors(folder: Path, shape: Skeleton) -> None:
    """Compare the tensors of a checked folder with those the architecture has, values unread.

    Raises:
        ModelError: names every tensor that is missing, of another shape, or not of this model.
    """
    with Tensors(folder) as tensors:
        found = {name: tensors.shape(name) for name in tensors.names()}
    wrong = [
        f"{name}: missing" for name in shape.tensors if name not in found and name not in shape.tied
    ]
    wrong += [
        f"{name}: shape {list(found[name])}, the config says {list(expected)}"
        for name, expected in shape.tensors.items()
        if name in found and found[name] != expected
    ]
    wrong += [
        f"{name}: no tensor of this architecture"
        for name in found
        if name not in shape.tensors and not name.endswith(IGNORED_SUFFIX)
    ]
    if wrong:
        raise ModelError(f"{folder} does not fit its own config.json:\n{bullet_list(wrong)}")
