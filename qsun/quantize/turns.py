"""Turns: inputs are taken one after another, a few at once before all others hear of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

AT_ONCE = 32  # inputs, of one group, whose effect on later ones is then made in one product


@contextmanager
def one_thread() -> Iterator[None]:
    """On a processor rows are too short to share: threads would wait for one another at each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
