"""The turns of a few inputs, on what runs them.

An accelerator takes a tile as one operation: row by row it would wait for launches alone. The same
arithmetic as the loops of `compensation` and `refinement`, with every row a tensor of its own, so
that torch.compile makes few kernels of it. Tiles are float32 `[inputs, out]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

Tiles = tuple[torch.Tensor, torch.Tensor]
Rows = Sequence[torch.Tensor]


def at_once(device: torch.device) -> int:
    """Inputs of a tile, all of one group where it matters: what a compiler still takes well."""
    return 16 if device.type == "cuda" else 32


def compensate_tile(
    left: torch.Tensor,
    scales: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    upper: torch.Tensor,
) -> Tiles:
    """Code minus zero of a tile's weights `left`, and what each input in turn hands to later ones.

    `scales`, `least` and `most` are of each row's group; `upper` `[inputs, inputs]` is the tile of
    the factor.
    """
    rows = [part.unbind(0) for part in (left, scales, least, most)]
    return _stacked(compiled(_compensate)(*rows, upper))


def descend_tile(
    pull: torch.Tensor,
    steps: torch.Tensor,
    scale: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    gram: torch.Tensor,
) -> Tiles:
    """A tile's code minus zero after one turn each, and by how much each weight moved.

    `scale`, `least` and `most` `[out]` are the group's; `gram` `[inputs, inputs]` the tile's own.
    """
    return _stacked(compiled(_descend)(pull.unbind(0), steps.unbind(0), scale, least, most, gram))


def _compensate(
    left: Rows, scales: Rows, least: Rows, most: Rows, upper: torch.Tensor
) -> list[Tiles]:
    made: list[Tiles] = []
    for at, row in enumerate(left):
        for before, (_, error) in enumerate(made):
            row = row - upper[before, at] * error
        code = (row / scales[at]).round().clamp(least[at], most[at])
        made.append((code, (row - code * scales[at]) / upper[at, at]))
    return made


def _descend(
    pull: Rows,
    steps: Rows,
    scale: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    gram: torch.Tensor,
) -> list[Tiles]:
    made: list[Tiles] = []
    for at, row in enumerate(pull):
        for before, (_, moved) in enumerate(made):
            row = row - gram[before, at] * moved
        was = steps[at] * scale
        code = ((was + row / gram[at, at]) / scale).round().clamp(least, most)
        made.append((code, code * scale - was))
    return made


def _stacked(made: list[Tiles]) -> Tiles:
    codes, others = zip(*made, strict=True)
    return torch.stack(codes), torch.stack(others)


@contextmanager
def one_thread() -> Iterator[None]:
    """On a processor rows are too short to share: threads would wait for one another at each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def compiled(turns: Callable[..., list[Tiles]]) -> Any:
    """One compilation serves every layer: outputs may be any number."""
    return torch.compile(turns, dynamic=True)
