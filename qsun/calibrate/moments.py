"""Moments: all that quantizing a linear layer needs to know of its inputs, summed over positions.

With the inputs X `[rows, in]`, G = X^T X is enough to know the error of any stand-in V for a
weight W: ||X (V - W)^T||^2 = tr((V - W) G (V - W)^T). No sample is run again to try another V.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from qsun.calibrate.row_pairs import RowPairs

_PRECISION = Lock()  # of products: the process has one, whichever thread sets it


@dataclass
class Moments:
    """Sums over the rows that were added, each as often as its weight says; float32.

    `gram` `[in, in]` is the sum of x^T x; `cross` `[in, in]`, where inputs were given as the
    full-precision decode module reads them, e, too, the sum of e^T x; `absolute` `[in]` that of
    |x|. `rows` were added, of `weight` together. `pairs` are some of the rows themselves, with
    their exact ones.
    """

    gram: torch.Tensor
    cross: torch.Tensor | None
    absolute: torch.Tensor
    rows: int = 0
    weight: float = 0.0
    pairs: RowPairs | None = None

    @classmethod
    def of(cls, inputs: int, device: torch.device, crossed: bool) -> Moments:
        """Moments of nothing yet."""
        square = torch.zeros(inputs, inputs, device=device)
        cross = torch.zeros_like(square) if crossed else None
        return cls(square, cross, torch.zeros(inputs, device=device))

    def add(
        self, inputs: torch.Tensor, exact: torch.Tensor | None = None, weight: float = 1.0
    ) -> None:
        """Add rows `[rows, in]`, and the same rows as full precision has them."""
        _add_product(self.gram, inputs, inputs, weight)
        if self.cross is not None:
            assert exact is not None
            _add_product(self.cross, exact, inputs, weight)
        self.absolute.add_(inputs.abs().sum(dim=0, dtype=torch.float32), alpha=weight)
        self.rows += len(inputs)
        self.weight += weight * len(inputs)

    def join(self, other: Moments) -> None:
        """Add what was summed elsewhere, over other rows."""
        self.gram += other.gram.to(self.gram.device)
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross.to(self.gram.device)
        self.absolute += other.absolute.to(self.gram.device)
        self.rows += other.rows
        self.weight += other.weight
        if self.pairs is not None and other.pairs is not None:
            self.pairs.join(other.pairs, self.gram.device)


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weight: float
) -> None:
    """Add weight * left^T right. Products of bfloat16 are exact in float32, which sums them."""
    if left.dtype == torch.bfloat16 and left.is_cuda:
        total.add_(torch.mm(left.t(), right, out_dtype=torch.float32), alpha=weight)
        return
    if left.dtype != torch.bfloat16:
        total.addmm_(left.float().t(), right.float(), alpha=weight)
        return
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _PRECISION:
        before = products.fp32_precision
        products.fp32_precision = "bf16"  # what the values are anyway
        try:
            total.addmm_(left.float().t(), right.float(), alpha=weight)
        finally:
            products.fp32_precision = before
