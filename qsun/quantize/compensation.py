"""Error compensation: weights are rounded one input at a time, and the rest makes up for it.

Source: GPTQ, arXiv 2210.17323, on the Gram matrix of the inputs. Inputs of the largest moments come
first ("activation order"); groups keep their place, so the layer is stored as any other.
"""

from __future__ import annotations

import torch

from qsun.quantize.code_grid import CodeGrid

AT_ONCE = 64  # inputs whose corrections are held back and then made in one product


def compensated(
    weight: torch.Tensor, gram: torch.Tensor, grid: CodeGrid, damping: float
) -> torch.Tensor:
    """Code minus zero of every weight, float32 `[in, out]`; `weight` is of the same shape.

    `damping` is added to the Gram matrix's diagonal, as a share of its mean.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    left = weight[order]
    upper = _inverse_factor(damped(gram, damping)[order][:, order])
    group_of = (order // grid.group_size).tolist()
    steps = torch.empty_like(left)
    for start in range(0, len(order), AT_ONCE):
        end = min(start + AT_ONCE, len(order))
        errors = torch.empty_like(left[start:end])
        for at in range(start, end):
            group = group_of[at]
            steps[at] = grid.nearest(left[at], group)
            error = left[at] - steps[at] * grid.scales[group]
            errors[at - start] = error.div_(upper[at, at])
            left[at + 1 : end].addr_(upper[at, at + 1 : end], error, alpha=-1)
        left[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    found = torch.empty_like(steps)
    found[order] = steps
    return found


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The Gram matrix with a share of its mean diagonal added to the diagonal."""
    added = gram.clone()
    mean = gram.diagonal().mean()
    added.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return added


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)
