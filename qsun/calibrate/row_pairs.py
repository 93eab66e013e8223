"""Row pairs: some positions' inputs, as the quantized decode module has them and as it should.

Sums tell how wrong a layer is on the inputs that it gets. These tell how wrong its outputs are
against those of full precision, and how much of that came with the inputs.
"""

from __future__ import annotations

import torch

KEPT = 256  # about so many positions, evenly spaced: memory does not grow with the calibration


class RowPairs:
    """Every `every`th of the rows that are added."""

    def __init__(self, positions: int) -> None:
        self._every = max(1, positions // KEPT)
        self._next = 0
        self._inputs: list[torch.Tensor] = []
        self._exact: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor, exact: torch.Tensor) -> None:
        """Look at rows `[rows, in]` and the same rows as full precision has them."""
        # Copies: views would hold all rows in memory.
        self._inputs.append(inputs[self._next :: self._every].clone())
        self._exact.append(exact[self._next :: self._every].clone())
        self._next = (self._next - len(inputs)) % self._every

    def join(self, other: RowPairs, device: torch.device) -> None:
        """Take the rows that were kept elsewhere."""
        self._inputs += [one.to(device) for one in other._inputs]
        self._exact += [one.to(device) for one in other._exact]

    @property
    def inputs(self) -> torch.Tensor:
        """The rows kept, float32 `[rows, in]`."""
        return torch.cat(self._inputs).float()

    @property
    def exact(self) -> torch.Tensor:
        """The same rows as full precision has them, float32 `[rows, in]`."""
        return torch.cat(self._exact).float()
