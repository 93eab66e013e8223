"""Processes: several that train one module together, one for each accelerator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def count() -> int:
    """Processes that a launcher such as `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; 0 writes files."""
    return int(os.environ.get("RANK", "0"))


def my_share(total: int) -> list[int]:
    """The indices below `total` that are this process's to work on."""
    return list(range(rank(), total, count()))


def gather(items: list[Item]) -> list[Item]:
    """Every process's items, in all processes."""
    if count() == 1:
        return items
    import torch

    found: list[list[Item]] = [[] for _ in range(count())]
    torch.distributed.all_gather_object(found, items)
    return [item for part in found for item in part]


@contextmanager
def first_process_first() -> Iterator[None]:
    """The block runs in process 0, then in the others, which find what it left."""
    if count() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        yield
