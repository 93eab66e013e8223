"""Error compensation: weights are rounded one input at a time, and the rest makes up for it.

Source: GPTQ, arXiv 2210.17323, on the Gram matrix of the inputs. Inputs of the largest moments come
first ("activation order"); groups keep their place, so the layer is stored as any other.
"""

from __future__ import annotations

import torch

from qsun.quantize.code_grid import CodeGrid
from qsun.quantize.turns import AT_ONCE, one_thread

FLOOR = 1e-6


def compensated(
    weight: torch.Tensor, gram: torch.Tensor, inverse: torch.Tensor, grid: CodeGrid
) -> torch.Tensor:
    """Code minus zero of every weight, float32 `[in, out]`; `weight` is of the same shape.

    `inverse` is that of the damped Gram matrix.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    left, groups = weight[order], order // grid.group_size
    upper = torch.linalg.cholesky(inverse[order][:, order], upper=True)
    steps = torch.empty_like(left)
    for start in range(0, len(order), AT_ONCE):
        end = min(start + AT_ONCE, len(order))
        tile, within = slice(start, end), upper[start:end, start:end]
        steps[tile], errors = take_turns(left[tile], grid, groups[tile], within)
        left[end:].addmm_(upper[tile, end:].t(), errors, alpha=-1)
    found = torch.empty_like(steps)
    found[order] = steps
    return found


def take_turns(
    left: torch.Tensor, grid: CodeGrid, groups: torch.Tensor, upper: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile's code minus zero, and what each input hands to those after it; `left` is changed."""
    if left.is_cuda:
        from qsun.quantize.turns_on_gpu import compensating_turns

        return compensating_turns(left, *grid.of_groups(groups), upper)
    rounding, diagonal = grid.by_group(groups), upper.diagonal().tolist()
    steps, errors = torch.empty_like(left), torch.empty_like(left)
    with one_thread():
        for at, (row, found, error) in enumerate(zip(left, steps, errors, strict=True)):
            rounding[at].into(row, found)
            torch.addcmul(row, found, rounding[at].scale, value=-1, out=error)
            error.div_(diagonal[at])
            left[at + 1 :].addr_(upper[at, at + 1 :], error, alpha=-1)
    return steps, errors


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The Gram matrix with more on its diagonal, so that no input counts as one never seen.

    Each input's own moment grows by `damping` times the geometric mean of itself and the mean one:
    by more, of itself, where it is small. None counts as smaller than `FLOOR` of the mean.
    """
    own = gram.diagonal()
    mean = own.mean()
    added = gram.clone()
    added.diagonal().add_(
        damping * (own.clamp_min(FLOOR * mean) * mean).sqrt() if mean > 0 else 1.0
    )
    return added


def inverted(damped_gram: torch.Tensor) -> torch.Tensor:
    """The inverse of a damped Gram matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped_gram))
