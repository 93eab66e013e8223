"""Engine qsun: calibrate and quantize block by block, with one block of each module in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import embedding

from qsun.block import LAYERS, Block, Stage
from qsun.calibrate.moments import Moments
from qsun.calibrate.pieces import Piece, cut_as_served, whole_texts
from qsun.calibrate.samples import Sample
from qsun.calibrate.streams import Embedding, Streams
from qsun.checkpoint_files import Tensors
from qsun.config import SearchConfig
from qsun.jobs.prepare import Prepared
from qsun.jobs.search_state import KeptBlock, SearchState
from qsun.models import serving_dtype
from qsun.prefill_module import PrefillTensors
from qsun.progress import bar
from qsun.quantize.block_search import BlockFound, BlockSearch

EMBEDDING = "model.embed_tokens.weight"


class BlockWalk:
    """The modules, opened and walked together; a context, for their files."""

    def __init__(self, prepared: Prepared, base: Path, samples: Sequence[Sample]) -> None:
        self._stack = ExitStack()
        self._config, self._search = prepared.model_config, prepared.settings.search
        self._dtype = getattr(torch, serving_dtype(self._config))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._base = self._stack.enter_context(Tensors(base))
        chosen = {one.task: prepared.config_dir / one.module for one in self._search.prefill}
        pieces = pieces_of(samples, self._search)
        self._prefill = {
            source: self._stack.enter_context(PrefillTensors(chosen.get(source), base))
            for source in sorted({piece.source for piece in pieces if piece.prompts is not None})
        }
        prompts = {source: self._embedding(found) for source, found in self._prefill.items()}
        own = self._embedding(self._base)
        self.streams = Streams(pieces, own, prompts, self._search.sequential)
        self._exact, self._quantized, self._writer = (self._block() for _ in range(3))
        plan, points = prepared.plan, prepared.settings.grid_points
        self._block_search = BlockSearch(plan, self._search, points, self._dtype)

    def __enter__(self) -> BlockWalk:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _block(self) -> Block:
        return Block(self._config, self._dtype, self._device)

    def _embedding(self, tensors: Tensors | PrefillTensors) -> Embedding:
        weight = tensors[EMBEDDING].to(self._dtype)
        return lambda tokens: embedding(tokens, weight)

    @torch.no_grad()
    def quantize(self, index: int) -> BlockFound:
        """Quantize block `index`, before which the streams stand."""
        self._load(index)
        return self._block_search.run(index, self._quantized, self._moments, self.streams.restart)

    @torch.no_grad()
    def advance(self) -> None:
        """Go on behind the block that was quantized last."""
        self.streams.advance(self._exact, self._quantized)

    def _moments(self, stage: Stage) -> Moments:
        return self.streams.moments(stage, self._exact, self._quantized)

    def _load(self, index: int) -> None:
        for source, tensors in self._prefill.items():
            self._writer.load(index, block_weights(tensors, index))
            self.streams.write_prompts(source, self._writer)
        weights = block_weights(self._base, index)
        self._exact.load(index, weights)
        # Of its own: a file's tensors are views of one mapping, and these will be written to.
        self._quantized.load(index, {name: one.clone() for name, one in weights.items()})


def pieces_of(samples: Sequence[Sample], search: SearchConfig) -> list[Piece]:
    """The samples as the decode module reads them; those without a response are left out."""
    if search.positions == "all":
        return whole_texts(samples, search.batch_tokens)
    return cut_as_served([one for one in samples if one.is_served], search.batch_tokens)


def block_weights(tensors: Tensors | PrefillTensors, index: int) -> dict[str, torch.Tensor]:
    """A block's tensors, named as within it."""
    prefix = f"{LAYERS}.{index}."
    return {
        name.removeprefix(prefix): tensors[name]
        for name in tensors.names()
        if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")
    }


def search_blocks(
    prepared: Prepared, base: Path, samples: Sequence[Sample], state: SearchState
) -> None:
    """Quantize every block into `state`; going on from where it stands."""
    blocks = int(prepared.model_config["num_hidden_layers"])
    with BlockWalk(prepared, base, samples) as walk, bar("blocks", blocks) as shown:
        kept, first = state.streams(), 0
        if kept is not None:
            first = kept[0]
            walk.streams.restore(kept[1])
            shown.update(first)
        for index in range(first, blocks):
            found = walk.quantize(index)
            state.keep_block(index, _kept(found))
            if index + 1 < blocks:
                walk.advance()
                state.keep_streams(index + 1, walk.streams.tensors)
            shown.update(1)


def _kept(found: BlockFound) -> KeptBlock:
    report: Mapping[str, Any] = {
        "errors": {one.layer.name: one.error for one in found.layers},
        "rounded_errors": {one.layer.name: one.rounded_error for one in found.layers},
        "gains": [asdict(gain) for gain in found.gains],
    }
    return KeptBlock([one.layer for one in found.layers], found.others, dict(report))
