"""AWQ by llm-compressor, with qsun's mappings, held to them while it runs.

Source: AWQ, arXiv 2306.00978; llm-compressor 0.14, `modifiers/transform/awq`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from pydantic import PrivateAttr
from torch.utils.data import DataLoader, Dataset

from qsun.progress import bar
from qsun.quantize.mappings import SMOOTHINGS, assert_kv_neutral
from qsun.quantize.plan import Plan
from qsun.quiet import hushed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SmoothingGain:
    """Mean squared error of a block's output before and after smoothing by one layer's scales."""

    layer: str
    block: str
    before: float
    after: float


@dataclass(frozen=True)
class Smoothed:
    """What AWQ did: the gain of each smoothing and, by layer name, its channel scales.

    A layer with input scales s has had its weight's columns multiplied by s; one with output
    scales t, its rows divided by t.
    """

    gains: list[SmoothingGain]
    input_scales: dict[str, torch.Tensor]
    output_scales: dict[str, torch.Tensor]

    def undo(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A smoothed layer's weight `[out, in]`, put back to the scale of the base model."""
        if name in self.input_scales:
            weight = weight / self.input_scales[name]
        if name in self.output_scales:
            weight = weight * self.output_scales[name].unsqueeze(-1)
        return weight


@dataclass(frozen=True)
class BlockProgress:
    """What is told of every finished block."""

    advance: Callable[[], Any]


class KvNeutralAwq(AWQModifier):
    """llm-compressor's AWQ, stopped if a resolved mapping would rescale what D reads."""

    _gains: list[SmoothingGain] = PrivateAttr(default_factory=list)
    _input_scales: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _output_scales: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _progress: BlockProgress = PrivateAttr(default_factory=lambda: BlockProgress(lambda: None))

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Check the mappings as resolved on the real modules, before the first is applied."""
        super().on_calibration_start(state, event, **kwargs)
        assert_kv_neutral(mapping.smooth_name for mapping in self._resolved_mappings)

    def _compute_best_scale(self, mapping: Any, *args: Any) -> torch.Tensor:
        """Keep the scales, float32 `[channels]`, that llm-compressor applies and forgets."""
        scales: torch.Tensor = super()._compute_best_scale(mapping, *args)
        self._output_scales[mapping.smooth_name] = scales.float()
        self._input_scales.update(dict.fromkeys(mapping.balance_names, scales.float()))
        return scales

    def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Smooth one block and report it."""
        super().on_sequential_epoch_end(state, event, **kwargs)
        self._progress.advance()

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        """Keep the errors that llm-compressor would now forget."""
        self._gains.extend(
            SmoothingGain(
                layer=entry["layer_name"],
                block=entry["parent_name"],
                before=entry["initial_error"],
                after=entry["best_error"],
            )
            for entry in self._error_metrics
        )
        return bool(super().on_finalize(state, **kwargs))


def apply_awq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    texts: Sequence[Sequence[int]],
    grid_points: int,
) -> Smoothed:
    """Smooth `model` in place and give its planned layers their scales and zeros.

    Weights stay in full precision until they are packed; the forward pass already rounds them.
    """
    smoother = KvNeutralAwq(
        mappings=[
            AWQMapping(f"re:.*{smoothing.source}$", [f"re:.*{t}$" for t in smoothing.targets])
            for smoothing in SMOOTHINGS[plan.architecture]
        ],
        n_grid=grid_points,
    )
    quantizer = QuantizationModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": plan.arguments}},
        ignore=list(plan.full_precision_layers),
    )
    batches = [
        {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text)).long()}
        for text in texts
    ]
    blocks = model.config.num_hidden_layers
    with (
        bar("AWQ, block by block", blocks) as shown,
        _no_pinning_without_accelerator(),
        hushed(),
    ):
        # One epoch more than there are blocks ends the head, which is not quantized.
        smoother._progress = BlockProgress(lambda: shown.update(min(1, blocks - shown.n)))
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=DataLoader(cast("Dataset[Any]", batches), batch_size=None),
            recipe=[smoother, quantizer],
            pipeline="sequential",
        )
    return Smoothed(smoother._gains, smoother._input_scales, smoother._output_scales)


@contextmanager
def _no_pinning_without_accelerator() -> Iterator[None]:
    """llm-compressor 0.14.0.1 pins memory for a transfer to a GPU even where there is none."""
    if torch.accelerator.is_available():
        yield
        return
    original = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = original
