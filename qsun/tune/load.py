"""Loading: the frozen modules and the one that is trained, on their device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import set_seed

from qsun.decode_checkpoint import load_dequantized
from qsun.models import load_model
from qsun.processes import rank
from qsun.tune.modules import TunedModules, trainable
from qsun.tune.precision import compute_in
from qsun.tune.work import Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Frozen:
    """The modules that nobody trains, on their device; `decode` is `base` but for system qsun."""

    base: PreTrainedModel
    decode: PreTrainedModel
    teacher: PreTrainedModel | None


def load_frozen(work: Work) -> Frozen:
    """Open the base model, the decode module and the teacher."""
    paths, device = work.checkpoints, device_of_process()
    base = load_model(paths.base, work.dtype).to(device)
    quantized = work.system == "qsun" and paths.decode is not None
    return Frozen(
        base,
        load_dequantized(cast(Path, paths.decode)).to(device) if quantized else base,
        load_model(paths.teacher, work.dtype).to(device) if paths.teacher is not None else None,
    )


def trained_modules(work: Work, frozen: Frozen) -> tuple[PreTrainedModel, TunedModules]:
    """The prefill module as the base model with trainable weights, and the training forward."""
    settings, device = work.run.tune, device_of_process()
    set_seed(work.run.seed)
    prefill = trainable(load_model(work.checkpoints.base, work.dtype), settings).to(device)
    decode = None if work.system == "full-ft" else frozen.decode
    compiled = settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")
    for module in (prefill, decode):
        if module is not None:
            compute_in(
                module,
                getattr(torch, work.dtype),
                gradient_checkpointing=settings.gradient_checkpointing,
                compiled=compiled,
            )
    return prefill, TunedModules(prefill, decode, frozen.teacher, settings, compiled=compiled)


def device_of_process() -> torch.device:
    """Each process has an accelerator of its own, where there are any."""
    return torch.device("cuda", rank()) if torch.cuda.is_available() else torch.device("cpu")
