"""The allocation of bits: which stage of which block gets how many, within a size.

Exact, by dynamic programming over the size in units that all stages are whole numbers of. Where
these would be too many, units are larger and sizes rounded up, which stays within the size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_UNITS = 100_000  # of the table, which has a byte for each unit and stage


@dataclass(frozen=True)
class StageLosses:
    """Linear layers that share their bits: how many weights, and what each number of bits costs.

    `losses` are comparable between stages.
    """

    layers: tuple[str, ...]
    weights: int
    losses: Mapping[int, float]


def allocate(stages: Sequence[StageLosses], target_bits: float) -> dict[str, int]:
    """Bits for every layer, by name, of least loss in all; of equals, the fewest bits.

    Their mean over all weights is at most `target_bits`.

    Raises:
        ValueError: even the fewest bits of all are more.
    """
    fewest = [min(stage.losses) for stage in stages]
    room = target_bits * sum(stage.weights for stage in stages)
    room -= sum(bits * stage.weights for bits, stage in zip(fewest, stages, strict=True))
    if room < 0:
        raise ValueError(f"no layer can have fewer bits than {min(fewest)}")
    unit = max(math.gcd(*(stage.weights for stage in stages)), math.ceil(room / MOST_UNITS))
    sizes = [
        {bits: math.ceil((bits - least) * stage.weights / unit) for bits in sorted(stage.losses)}
        for least, stage in zip(fewest, stages, strict=True)
    ]
    chosen = _least_loss(stages, sizes, int(room // unit))
    return {name: bits for bits, stage in zip(chosen, stages, strict=True) for name in stage.layers}


def _least_loss(
    stages: Sequence[StageLosses], sizes: Sequence[Mapping[int, int]], room: int
) -> list[int]:
    """Each stage's bits; `sizes` are what they take of `room`, beyond the fewest."""
    best = np.zeros(room + 1)  # the least loss of the stages so far, by the room that they have
    taken = []
    for stage, size_of in zip(stages, sizes, strict=True):
        tried = np.full((len(size_of), room + 1), np.inf)
        for row, (bits, size) in zip(tried, size_of.items(), strict=True):
            if size <= room:
                row[size:] = best[: room + 1 - size] + stage.losses[bits]
        taken.append(tried.argmin(axis=0).astype(np.int8))
        best = tried.min(axis=0)
    chosen = []
    for size_of, choice in zip(reversed(sizes), reversed(taken), strict=True):
        bits = list(size_of)[choice[room]]
        room -= size_of[bits]
        chosen.append(bits)
    return chosen[::-1]
