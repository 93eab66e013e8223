"""The error of a quantized layer's outputs, on inputs it really sees.

For a layer with weight W, inputs X `[rows, in]` and a stand-in V for its weight, the error is
||X (V - W)^T|| / ||X W^T|| in the Frobenius norm: 0 is exact, 1 is as wrong as no output at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qsun.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256  # input rows kept per layer: memory does not grow with the calibration set


def sample_inputs(
    model: PreTrainedModel, names: Sequence[str], texts: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Up to `ROWS` input rows per layer, at evenly spaced positions of every text."""
    per_text = max(1, ROWS // len(texts))
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            at = torch.linspace(0, len(rows) - 1, min(per_text, len(rows))).round().long()
            kept[name].append(rows[at].cpu())

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            for text in track(texts[:ROWS], "layer inputs", len(texts[:ROWS])):
                model.model(torch.tensor([text], device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in kept.items()}


def output_error(inputs: torch.Tensor, weight: torch.Tensor, stand_in: torch.Tensor) -> float:
    """Relative error of the outputs, float; `inputs` `[rows, in]`, both weights `[out, in]`."""
    exact = weight.float()
    rows = inputs.to(weight.device).float()
    reference = (rows @ exact.t()).norm()
    if reference == 0:
        return 0.0
    return float((rows @ (stand_in.float() - exact).t()).norm() / reference)
