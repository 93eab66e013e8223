"""Streams: what prefill and decode modules make of the calibration samples, block after block.

Three streams of states stand before a block: the prefill modules' over prompts, the full-precision
decode module's and the quantized one's over what they read. All are walked together, so that one
block of each module is in memory, and never a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path

import torch

from qsun.block import Block, Reading, Stage
from qsun.calibrate.moments import Moments
from qsun.calibrate.pieces import Piece
from qsun.calibrate.row_pairs import RowPairs
from qsun.calibrate.shelf import MemoryShelf, Shelf

Embedding = Callable[[torch.Tensor], torch.Tensor]
PROMPTS, KEYS, VALUES, ATTENTION = "prompts", "keys", "values", "attention"


class Flow(Enum):
    """A decode module's states before a block, `[rows, positions, hidden]`, by whose they are."""

    EXACT = "exact"
    """The full-precision module's."""
    QUANTIZED = "quantized"
    """The quantized module's; there are none where layers are calibrated on the exact inputs."""


class Streams:
    """Pieces, walked block by block. Their tensors wait on `shelf`, under names with `prefix`.

    Of a piece these are: the prompts' states, their K and V in this block, each flow's states, and
    what its attention gave, `[rows, positions, heads * head size]`, as soon as it is known.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        embed: Embedding,
        embed_prompts: Mapping[str, Embedding],
        sequential: bool,
        shelf: Shelf | None = None,
        prefix: str = "",
    ) -> None:
        self.pieces = list(pieces)
        self._flows = list(Flow) if sequential else [Flow.EXACT]
        self._shelf = MemoryShelf() if shelf is None else shelf
        self._prefix = prefix
        for number, piece in enumerate(pieces):
            if piece.prompts is not None:
                prompts = embed_prompts[piece.source](piece.prompts)
                self._shelf[self._name(number, PROMPTS)] = prompts
            states = embed(piece.read)
            for flow in self._flows:
                self._shelf[self._name(number, flow.value)] = states

    def _name(self, number: int, what: str) -> str:
        return f"{self._prefix}{number}-{what}"

    @property
    def counted_positions(self) -> int:
        """Positions whose inputs count, over all pieces."""
        return sum(piece.counted_positions for piece in self.pieces)

    def states(self, number: int, flow: Flow = Flow.EXACT) -> torch.Tensor:
        """A piece's states before the next block."""
        return self._shelf[self._name(number, flow.value)]

    @property
    def served_positions(self) -> int:
        """Those of them that are computed behind a prompt."""
        return sum(one.counted_positions for one in self.pieces if one.prompts is not None)

    def write_prompts(self, source: str, prefill: Block) -> None:
        """Let a source's prefill module, its block loaded, write K and V of its prompts."""
        for number, piece in enumerate(self.pieces):
            if piece.source == source and piece.prompts is not None:
                prompts = self._name(number, PROMPTS)
                found = prefill.write(self._shelf[prompts].to(prefill.device))
                names = (self._name(number, KEYS), self._name(number, VALUES), prompts)
                for name, tensor in zip(names, found, strict=True):
                    self._shelf[name] = tensor.cpu()

    def moments(self, stage: Stage, exact: Block, quantized: Block) -> Moments:
        """Moments of what a stage's layers read, at the positions that count.

        With a quantized stream these are its inputs, crossed with the exact ones and, where they
        are served, paired with some of them.
        """
        first = exact.linear(stage.value[0])
        crossed = Flow.QUANTIZED in self._flows
        found = Moments.of(first.in_features, exact.device, crossed)
        pairs = RowPairs(self.served_positions or self.counted_positions)
        for number, piece in enumerate(self.pieces):
            counted = piece.counted.to(exact.device)
            inputs = self._inputs(stage, number, Flow.EXACT, exact)[counted]
            if crossed:
                ours = self._inputs(stage, number, Flow.QUANTIZED, quantized)[counted]
                found.add(ours, inputs, piece.weight)
                if piece.prompts is not None or not self.served_positions:
                    pairs.add(ours, inputs)
            else:
                found.add(inputs, None, piece.weight)
        found.pairs = pairs if crossed else None
        return found

    def restart(self) -> None:
        """Forget what was computed within this block: its weights have changed."""
        for number in range(len(self.pieces)):
            self._shelf.pop(self._attention_name(number, Flow.QUANTIZED), None)

    def advance(self, exact: Block, quantized: Block) -> None:
        """Go on to the next block."""
        for number in range(len(self.pieces)):
            for flow in self._flows:
                self._advance(number, flow, exact if flow is Flow.EXACT else quantized)
            for what in (KEYS, VALUES):
                self._shelf.pop(self._name(number, what), None)

    def names(self) -> Iterator[str]:
        """The names of what stands before the next block."""
        for number, piece in enumerate(self.pieces):
            yield from (self._name(number, flow.value) for flow in self._flows)
            if piece.prompts is not None:
                yield self._name(number, PROMPTS)

    def store(self, folder: Path) -> None:
        """Write what stands before the next block."""
        for name in self.names():
            self._shelf.store(name, folder)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stand where `tensors` were taken."""
        for name in self.names():
            self._shelf[name] = tensors[name]

    def _inputs(self, stage: Stage, number: int, flow: Flow, block: Block) -> torch.Tensor:
        states = self.states(number, flow).to(block.device)
        if stage is Stage.ATTENTION:
            return block.attention_input(states)
        attention = self._attention(number, flow, block, states)
        if stage is Stage.OUTPUT:
            return attention
        mlp_input = block.mlp_input(block.after_attention(states, attention))
        return mlp_input if stage is Stage.MLP else block.down_input(mlp_input)

    def _attention_name(self, number: int, flow: Flow) -> str:
        return self._name(number, f"{flow.value}-{ATTENTION}")

    def _attention(
        self, number: int, flow: Flow, block: Block, states: torch.Tensor
    ) -> torch.Tensor:
        """Attention's outputs, kept until the block is left: its layers are quantized by then."""
        name = self._attention_name(number, flow)
        if name in self._shelf:
            return self._shelf[name].to(block.device)
        found = block.attention_output(states, self._reading(number, block.device))
        self._shelf[name] = found.cpu()
        return found

    def _reading(self, number: int, device: torch.device) -> Reading | None:
        """What attention reads beside states."""
        piece = self.pieces[number]
        if piece.prompts is None:
            return None
        keys, values = (self._shelf[self._name(number, what)].to(device) for what in (KEYS, VALUES))
        return Reading(keys, values, piece.written.to(device), piece.read.shape[1])

    def _advance(self, number: int, flow: Flow, block: Block) -> None:
        states = self.states(number, flow).to(block.device)
        attention = self._attention(number, flow, block, states)
        after = block.after_mlp(block.after_attention(states, attention))
        self._shelf[self._name(number, flow.value)] = after.cpu()
        del self._shelf[self._attention_name(number, flow)]
