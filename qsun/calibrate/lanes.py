"""Lanes: the pieces split over devices, each of which walks its own through the same blocks.

What the lanes sum is joined in their order, so that the result depends on their number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from qsun.block import Block, Stage
from qsun.calibrate.moments import Moments
from qsun.calibrate.pieces import Piece
from qsun.calibrate.shelf import Shelf
from qsun.calibrate.streams import Embedding, Streams

Result = TypeVar("Result")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Lane:
    """One device's pieces, and its blocks of the prefill and both decode modules."""

    streams: Streams
    writer: Block
    exact: Block
    quantized: Block


class Lanes:
    """All pieces, on their devices; with several, each has a thread.

    Weights are loaded by one thread: transformers makes a stack under the process's default dtype.
    """

    def __init__(
        self,
        blocks: Callable[[torch.device], Block],
        devices: Sequence[torch.device],
        pieces: Sequence[Piece],
        embed: Embedding,
        embed_prompts: Mapping[str, Embedding],
        sequential: bool,
        shelf: Shelf,
    ) -> None:
        count = min(len(devices), len(pieces))
        self._lanes = []
        for number, device in enumerate(devices[:count]):
            ours = pieces[number::count]  # neighbours are of like length
            prefix = "" if count == 1 else f"{number}-"
            streams = Streams(ours, embed, embed_prompts, sequential, shelf, prefix)
            self._lanes.append(Lane(streams, *(blocks(device) for _ in range(3))))

    @property
    def exact(self) -> Block:
        """The full-precision block, the first lane's."""
        return self._lanes[0].exact

    @property
    def quantized(self) -> Block:
        """The block that is quantized: the first lane's, which the others follow."""
        return self._lanes[0].quantized

    def write_prompts(self, source: str, index: int, weights: Tensors) -> None:
        """Let a source's prefill module write K and V of its prompts in block `index`."""
        for lane in self._lanes:
            lane.writer.load(index, weights)
        self._each(lambda lane: lane.streams.write_prompts(source, lane.writer))

    def load(self, index: int, weights: Tensors) -> None:
        """Take block `index` of the decode module, to be quantized."""
        for lane in self._lanes:
            lane.exact.load(index, weights)
            # Of its own: a file's tensors are views of its mapping, and these are written to.
            lane.quantized.load(index, {name: one.clone() for name, one in weights.items()})

    def moments(self, stage: Stage) -> Moments:
        """Moments of what a stage's layers read, on the first lane's device."""

        def summed(lane: Lane) -> Moments:
            self._follow(lane)
            return lane.streams.moments(stage, lane.exact, lane.quantized)

        found, *others = self._each(summed)
        for other in others:
            found.join(other)
        return found

    def restart(self) -> None:
        """Forget what was computed within this block: its weights have changed."""
        for lane in self._lanes:
            lane.streams.restart()

    def advance(self) -> None:
        """Go on to the next block."""

        def advance(lane: Lane) -> None:
            self._follow(lane)
            lane.streams.advance(lane.exact, lane.quantized)

        self._each(advance)

    def store(self, folder: Path) -> None:
        """Write what stands before the next block."""
        for lane in self._lanes:
            lane.streams.store(folder)

    def restore(self, tensors: Tensors) -> None:
        """Stand where `tensors` were taken."""
        for lane in self._lanes:
            lane.streams.restore(tensors)

    def _follow(self, lane: Lane) -> None:
        if lane.quantized is not self.quantized:
            lane.quantized.follow(self.quantized)

    def _each(self, work: Callable[[Lane], Result]) -> list[Result]:
        """The lanes' results, in their order."""
        if len(self._lanes) == 1:
            return [work(self._lanes[0])]

        def on_its_device(lane: Lane) -> Result:
            device = lane.exact.device
            there: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with torch.no_grad(), there:  # both are a thread's own
                return work(lane)

        with ThreadPoolExecutor(len(self._lanes)) as threads:
            return list(threads.map(on_its_device, self._lanes))
