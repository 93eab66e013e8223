"""Turns: one thread while they are taken, and as many as before afterwards."""

from __future__ import annotations

import torch

from qsun.quantize.turns import one_thread


def test_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        within = torch.get_num_threads()
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (within, after) == (1, 2)
