"""The grid of codes that a weight is rounded to: a scale and a zero for every group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, calculate_range

from qsun.decode_checkpoint import QuantizedLayer


class Rounding(NamedTuple):
    """One group's scales, and the least and the most of its codes minus zeros; float32 `[out]`."""

    scale: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor

    def into(self, weight: torch.Tensor, steps: torch.Tensor) -> None:
        """Write the nearest code minus zero to `weight` `[out]` into `steps`."""
        torch.div(weight, self.scale, out=steps).round_().clamp_(self.least, self.most)


@dataclass(frozen=True)
class CodeGrid:
    """Weights are (code - zero) * scale, group by group.

    `scales`, which the checkpoint's `dtype` holds exactly, and `zeros`: float32 `[groups, out]`.
    Codes lie within `low` and `high`.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    low: int
    high: int
    group_size: int
    dtype: torch.dtype

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest code minus zero to `weight` `[groups, inputs of a group, out]`."""
        bounds = (self.low - self.zeros).unsqueeze(1), (self.high - self.zeros).unsqueeze(1)
        return (weight / self.scales.unsqueeze(1)).round_().clamp_(*bounds)

    def by_group(self, groups: torch.Tensor) -> list[Rounding]:
        """How the inputs of each of these groups are rounded, for going through them one by one."""
        parts = self.of_groups(groups)
        return [Rounding(*row) for row in zip(*(part.unbind(0) for part in parts), strict=True)]

    def of_groups(self, groups: torch.Tensor) -> Rounding:
        """The same of all these groups together, each part `[groups, out]`."""
        zeros = self.zeros[groups]
        return Rounding(self.scales[groups], self.low - zeros, self.high - zeros)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Code minus zero of every weight, each rounded by itself; float32 `[in, out]`."""
        grouped = weight.reshape(len(self.scales), self.group_size, -1)
        return self.nearest(grouped).reshape(weight.shape)

    def values(self, steps: torch.Tensor) -> torch.Tensor:
        """The weights that `steps`, code minus zero, stand for; both `[in, out]`."""
        grouped = steps.reshape(len(self.scales), self.group_size, -1)
        return (grouped * self.scales.unsqueeze(1)).reshape(steps.shape)

    def layer(self, name: str, steps: torch.Tensor) -> QuantizedLayer:
        """What is stored of a layer whose weight `steps` stand for."""
        grouped = steps.reshape(len(self.scales), self.group_size, -1)
        codes = (grouped + self.zeros.unsqueeze(1)).reshape(steps.shape)
        return QuantizedLayer(
            name,
            codes.t().to(torch.int8).contiguous().cpu(),
            self.zeros.t().to(torch.int8).contiguous().cpu(),
            self.scales.t().to(self.dtype).contiguous().cpu(),
        )


def grid_of(
    least: torch.Tensor, most: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> CodeGrid:
    """The grid that covers `least` to `most`, float32 `[groups, out]`, by compressed-tensors."""
    scales, zeros = calculate_qparams(least, most, args)
    low, high = calculate_range(args, least.device)
    held = scales.to(dtype).float()
    # A scale that the dtype rounds to nothing would divide by it.
    held = torch.where(held > 0, held, torch.finfo(dtype).tiny)
    assert args.group_size is not None
    return CodeGrid(held, zeros.float(), int(low), int(high), args.group_size, dtype)


def columns(grid: CodeGrid, rows: slice) -> CodeGrid:
    """The grid of some of the outputs."""
    return CodeGrid(
        grid.scales[:, rows], grid.zeros[:, rows], grid.low, grid.high, grid.group_size, grid.dtype
    )
