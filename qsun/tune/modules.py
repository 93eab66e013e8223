"""Modules: the trainable prefill module and the frozen rest, as one module that gives the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import cross_entropy, kl_div

from qsun.config import TuneConfig
from qsun.handoff import Batch, Boundary, padded_logits, padded_single_logits
from qsun.tune.batches import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trainable(base: PreTrainedModel, settings: TuneConfig) -> PreTrainedModel:
    """The base model made trainable: all of it in float32, or float32 adapters on it frozen."""
    if settings.module == "full":
        return base.float().requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=cast(int, settings.lora.alpha),
        lora_dropout=settings.lora.dropout,
        target_modules=list(settings.lora.targets),
        task_type="CAUSAL_LM",
    )
    return cast("PreTrainedModel", get_peft_model(base, lora, autocast_adapter_dtype=True))


class TunedModules(torch.nn.Module):
    """One training forward: a batch's loss through the hand-off, or through one module.

    Without a `decode` module the prefill module reads prompt and response alike: full
    fine-tuning. The frozen modules are no submodules, so that nothing trains, saves or counts them.
    """

    accepts_loss_kwargs = True  # the trainer divides by all tokens of a step, not by micro-batches
    keep_gradients = False  # between steps, at the same address and zeroed: CUDA graphs need that

    def __init__(
        self,
        prefill: PreTrainedModel,
        decode: PreTrainedModel | None,
        teacher: PreTrainedModel | None,
        settings: TuneConfig,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.prefill = prefill
        self._frozen = (decode, teacher)
        self._boundary = Boundary(settings.boundary)
        self._nll = torch.compile(_summed_nll, dynamic=True) if compiled else _summed_nll
        self._kl_weight = {"nll": 0.0, "kl": 1.0, "mix": settings.kl_weight}[settings.loss]

    def forward(
        self,
        prompts: torch.Tensor,
        prompt_lengths: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss (nats) summed over the response tokens and divided by `num_items_in_batch`."""
        batch = Batch(prompts, prompt_lengths, labels.clamp(min=0), labels.ne(IGNORED).sum(dim=1))
        decode, teacher = self._frozen
        if decode is None:
            logits = padded_single_logits(self.prefill, batch)
        else:
            logits = padded_logits(self.prefill, decode, batch, self._boundary)
        count = labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": self._loss(logits, batch, labels, teacher) / count}

    def _loss(
        self,
        logits: torch.Tensor,
        batch: Batch,
        labels: torch.Tensor,
        teacher: PreTrainedModel | None,
    ) -> torch.Tensor:
        total = torch.zeros((), device=logits.device)
        if self._kl_weight < 1:
            total = total + (1 - self._kl_weight) * self._nll(logits, labels)
        if self._kl_weight > 0 and teacher is not None:
            with torch.no_grad():
                wanted = padded_single_logits(teacher, batch).float().log_softmax(-1)
            found = logits.float().log_softmax(-1)
            divergence = kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
            total = total + self._kl_weight * (divergence * batch.response_mask).sum()
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or zero them in place where `keep_gradients` says so."""
        super().zero_grad(set_to_none=set_to_none and not self.keep_gradients)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Every weight that is trained, by its name in the prefill module."""
        return {
            name: weight.data
            for name, weight in self.prefill.named_parameters()
            if weight.requires_grad
        }

    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        """Take back what `trained_weights` gave."""
        for name, weight in self.trained_weights().items():
            weight.copy_(weights[name])


def _summed_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED
    )
