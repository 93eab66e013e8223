"""Compare the GPU's kernels for a tile's turns with the plain loops, code by code.

    python -m tests.gpu.check_turns

Without a GPU, TRITON_INTERPRET=1 has Triton's interpreter run them on the processor. It ends with
1 where codes differ, other than by ties.
"""

from __future__ import annotations

import sys

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.quantize import compensation, refinement, turns_on_gpu
from qsun.quantize.clipping import whole_range
from qsun.quantize.code_grid import CodeGrid
from qsun.quantize.turns import AT_ONCE

INPUTS, OUTPUTS, ROWS, GROUP = 128, 1000, 700, 64
TIES = 1e-3  # share of codes that may differ


def main() -> None:
    """Draw a layer, take the turns of its first inputs both ways."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    weight = torch.randn(INPUTS, OUTPUTS)
    inputs = torch.randn(ROWS, INPUTS) @ torch.randn(INPUTS, INPUTS)
    gram = inputs.t() @ inputs
    for bits in (2, 3, 4):
        args = QuantizationArgs(
            num_bits=bits, type="int", symmetric=False, strategy="group", group_size=GROUP
        )
        grid = whole_range(weight, args, torch.bfloat16)
        different = max(
            compensating(weight, gram, grid, device), descending(weight, gram, grid, device)
        )
        print(f"{bits} bits: {different:.5f} of the codes differ")
        if different > TIES:
            sys.exit(1)


def compensating(
    weight: torch.Tensor, gram: torch.Tensor, grid: CodeGrid, device: torch.device
) -> float:
    """The share of codes that differ after error compensation."""
    inverse = compensation.inverted(compensation.damped(gram, 0.1))
    upper = torch.linalg.cholesky(inverse, upper=True)[:AT_ONCE, :AT_ONCE]
    tile, groups = weight[:AT_ONCE], torch.arange(AT_ONCE) % len(grid.scales)
    wanted, errors = compensation.take_turns(tile.clone(), grid, groups, upper)
    given = (tile, *grid.of_groups(groups), upper)
    steps, found = turns_on_gpu.compensating_turns(*(one.to(device) for one in given))
    same = steps.cpu() == wanted
    assert torch.allclose(found.cpu()[:1], errors[:1], rtol=1e-4, atol=1e-5)
    return 1 - float(same.float().mean())


def descending(
    weight: torch.Tensor, gram: torch.Tensor, grid: CodeGrid, device: torch.device
) -> float:
    """The share of codes that differ after one sweep of coordinate descent."""
    before = grid.rounded(weight)
    pull, within = gram[:AT_ONCE] @ (weight - grid.values(before)), gram[:AT_ONCE, :AT_ONCE]
    one = grid.by_group(torch.arange(len(grid.scales)))[0]
    wanted, _ = refinement.take_turns(pull.clone(), before[:AT_ONCE], one, within)
    given = (pull, before[:AT_ONCE], *one, within)
    steps, moved = turns_on_gpu.descending_turns(*(part.to(device) for part in given))
    assert bool((wanted != before[:AT_ONCE]).any()), "something moves"
    values = (steps.cpu() - before[:AT_ONCE]) * one.scale
    assert torch.allclose(moved.cpu(), values, rtol=1e-3, atol=1e-5)
    return 1 - float((steps.cpu() == wanted).float().mean())


if __name__ == "__main__":
    main()
