"""The same hand-off in this process: what the served one is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qsun.bundle import Bundle
from qsun.checkpoint_files import read_config_file
from qsun.decode_checkpoint import load_decode
from qsun.handoff import Boundary, collate, response_logits
from qsun.prefill_module import load_prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scored:
    """What the two modules make of given tokens, one after another, in nats.

    `log_probabilities` are the tokens' own; `gaps` how much likelier the likeliest was.
    """

    log_probabilities: list[float]
    gaps: list[float]


class InProcess:
    """A bundle's modules in transformers, each loaded when it is first needed."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._config = read_config_file(bundle.decode / "config.json")
        self._prefill: tuple[str, PreTrainedModel] | None = None

    @cached_property
    def _decode(self) -> PreTrainedModel:
        return load_decode(self._bundle.decode, self._config["dtype"])

    def _prefill_of(self, task: str) -> PreTrainedModel:
        """The task's prefill module; one is kept at a time."""
        if self._prefill is None or self._prefill[0] != task:
            folder = self._bundle.prefill[task]
            base = self._bundle.base or folder  # a full module needs none
            self._prefill = task, load_prefill(folder, base, self._config["dtype"])
        return self._prefill[1]

    def score(self, task: str, prompt: Sequence[int], tokens: Sequence[int]) -> Scored:
        """Score an answer, given whole, through the hand-off."""
        boundary = Boundary(self._bundle.manifest.boundary)
        batch = collate([prompt], [tokens])
        with torch.no_grad():
            logits = response_logits(self._prefill_of(task), self._decode, batch, boundary)
        scores = logits.float().log_softmax(-1)
        chosen = scores.gather(-1, batch.targets[:, None])[:, 0]
        return Scored(chosen.tolist(), (scores.amax(-1) - chosen).tolist())
