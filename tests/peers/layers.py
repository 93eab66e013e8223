"""Which layers every peer quantizes: the linear ones of the decoder blocks, and no head."""

from __future__ import annotations

from typing import Any

HEAD = "lm_head"


def linear_layers(model: Any) -> list[str]:
    """Their names, in the model's order."""
    from torch import nn

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != HEAD
    ]
