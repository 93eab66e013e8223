"""Streams: what prefill and decode modules make of the calibration samples, block after block.

Three streams of states stand before a block: the prefill modules' over prompts, the full-precision
decode module's and the quantized one's over what they read. All are walked together, so that one
block of each module is in memory, and never a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qsun.block import Block, Reading, Stage
from qsun.calibrate.moments import Moments
from qsun.calibrate.pieces import Piece
from qsun.calibrate.row_pairs import RowPairs

Embedding = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Flow:
    """One decode module's states before a block, `[rows, positions, hidden]`, and within it.

    `attention` is what its attention gave, `[rows, positions, heads * head size]`, before the
    layer that reads it; None until it is known.
    """

    states: torch.Tensor
    attention: torch.Tensor | None = None


@dataclass
class Stream:
    """One piece on its way: prompts' states, their K and V in this block, and the decode modules.

    `quantized` is None where layers are calibrated on full-precision inputs.
    """

    piece: Piece
    prompts: torch.Tensor | None
    exact: Flow
    quantized: Flow | None
    cache: tuple[torch.Tensor, torch.Tensor] | None = field(default=None)

    def reading(self, device: torch.device) -> Reading | None:
        """What attention reads beside states."""
        if self.cache is None:
            return None
        keys, values = (part.to(device) for part in self.cache)
        positions = self.piece.read.shape[1]
        return Reading(keys, values, self.piece.written.to(device), positions)


class Streams:
    """All pieces, walked block by block. Tensors wait in memory, not on the accelerator."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        embed: Embedding,
        embed_prompts: Mapping[str, Embedding],
        sequential: bool,
    ) -> None:
        self.streams = []
        for piece in pieces:
            prompts = None if piece.prompts is None else embed_prompts[piece.source](piece.prompts)
            states = embed(piece.read)
            quantized = Flow(states.clone()) if sequential else None
            self.streams.append(Stream(piece, prompts, Flow(states), quantized))

    @property
    def counted_positions(self) -> int:
        """Positions whose inputs count, over all pieces."""
        return sum(stream.piece.counted_positions for stream in self.streams)

    @property
    def served_positions(self) -> int:
        """Those of them that are computed behind a prompt."""
        return sum(one.piece.counted_positions for one in self.streams if one.prompts is not None)

    def write_prompts(self, source: str, prefill: Block) -> None:
        """Let a source's prefill module, its block loaded, write K and V of its prompts."""
        for stream in self.streams:
            if stream.piece.source == source and stream.prompts is not None:
                keys, values, after = prefill.write(stream.prompts.to(prefill.device))
                stream.cache = keys.cpu(), values.cpu()
                stream.prompts = after.cpu()

    def moments(self, stage: Stage, exact: Block, quantized: Block) -> Moments:
        """Moments of what a stage's layers read, at the positions that count.

        With a quantized stream these are its inputs, crossed with the exact ones and, where they
        are served, paired with some of them.
        """
        first = exact.linear(stage.value[0])
        crossed = self.streams[0].quantized is not None
        found = Moments.of(first.in_features, exact.device, crossed)
        pairs = RowPairs(self.served_positions or self.counted_positions)
        for stream in self.streams:
            counted = stream.piece.counted.to(exact.device)
            inputs = _inputs(stage, stream, stream.exact, exact)[counted]
            if stream.quantized is None:
                found.add(inputs, None, stream.piece.weight)
            else:
                ours = _inputs(stage, stream, stream.quantized, quantized)[counted]
                found.add(ours, inputs, stream.piece.weight)
                if stream.prompts is not None or not self.served_positions:
                    pairs.add(ours, inputs)
        found.pairs = pairs if crossed else None
        return found

    def restart(self) -> None:
        """Forget what was computed within this block: its weights have changed."""
        for stream in self.streams:
            if stream.quantized is not None:
                stream.quantized.attention = None

    def advance(self, exact: Block, quantized: Block) -> None:
        """Go on to the next block."""
        for stream in self.streams:
            _advance(stream, stream.exact, exact)
            if stream.quantized is not None:
                _advance(stream, stream.quantized, quantized)
            stream.cache = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What stands before the next block, by name."""
        named = {}
        for number, stream in enumerate(self.streams):
            named[f"{number}:exact"] = stream.exact.states
            if stream.quantized is not None:
                named[f"{number}:quantized"] = stream.quantized.states
            if stream.prompts is not None:
                named[f"{number}:prompts"] = stream.prompts
        return named

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stand where `tensors` were taken."""
        for number, stream in enumerate(self.streams):
            stream.exact = Flow(tensors[f"{number}:exact"])
            if stream.quantized is not None:
                stream.quantized = Flow(tensors[f"{number}:quantized"])
            if stream.prompts is not None:
                stream.prompts = tensors[f"{number}:prompts"]


def _inputs(stage: Stage, stream: Stream, flow: Flow, block: Block) -> torch.Tensor:
    states = flow.states.to(block.device)
    if stage is Stage.ATTENTION:
        return block.attention_input(states)
    attention = _attention(stream, flow, block, states)
    if stage is Stage.OUTPUT:
        return attention
    mlp_input = block.mlp_input(block.after_attention(states, attention))
    return mlp_input if stage is Stage.MLP else block.down_input(mlp_input)


def _attention(stream: Stream, flow: Flow, block: Block, states: torch.Tensor) -> torch.Tensor:
    """Attention's outputs, kept until the block is left: its layers are quantized by then."""
    if flow.attention is None:
        found = block.attention_output(states, stream.reading(block.device))
        flow.attention = found.cpu()
        return found
    return flow.attention.to(block.device)


def _advance(stream: Stream, flow: Flow, block: Block) -> None:
    states = flow.states.to(block.device)
    attention = _attention(stream, flow, block, states)
    flow.states = block.after_mlp(block.after_attention(states, attention)).cpu()
    flow.attention = None
