"""The walk: base model and prefill modules opened together, and quantized block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn.functional import embedding

from qsun.block import Block, block_weights
from qsun.calibrate.lanes import Lanes
from qsun.calibrate.pieces import Piece, cut_as_served, some_of, weighted, whole_texts
from qsun.calibrate.samples import Sample
from qsun.calibrate.shelf import Shelf
from qsun.calibrate.streams import Embedding
from qsun.checkpoint_files import Tensors
from qsun.config import SearchConfig
from qsun.jobs.prepare import Prepared
from qsun.models import serving_dtype
from qsun.prefill_module import PrefillTensors
from qsun.quantize.bit_errors import LayerErrors
from qsun.quantize.block_search import BlockFound, BlockSearch

PLAIN_TOKENS = 1  # tokens read whole for each position that is served
EMBEDDING = "model.embed_tokens.weight"


class BlockWalk:
    """The modules, opened and walked together; a context, for their files."""

    def __init__(
        self,
        prepared: Prepared,
        base: Path,
        samples: Sequence[Sample],
        shelf: Shelf,
        devices: Sequence[torch.device],
    ) -> None:
        self._stack = ExitStack()
        self._config, self._search = prepared.model_config, prepared.settings.search
        self._dtype = getattr(torch, serving_dtype(self._config))
        self._base = self._stack.enter_context(Tensors(base))
        shares = {source.name: source.weight for source in prepared.calibration.sources}
        pieces = pieces_of(samples, shares, self._search)
        self._prefill = {
            source: self._stack.enter_context(PrefillTensors(prepared.prefill.get(source), base))
            for source in sorted({piece.source for piece in pieces if piece.prompts is not None})
        }
        prompts = {source: self._embedding(found) for source, found in self._prefill.items()}
        own = self._embedding(self._base)
        sequential = self._search.sequential
        self.lanes = Lanes(self._block, devices, pieces, own, prompts, sequential, shelf)
        plan, points = prepared.plan, prepared.settings.grid_points
        self._block_search = BlockSearch(plan, self._search, points, self._dtype)

    def __enter__(self) -> BlockWalk:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _block(self, device: torch.device) -> Block:
        return Block(self._config, self._dtype, device)

    def _embedding(self, tensors: Tensors | PrefillTensors) -> Embedding:
        weight = tensors[EMBEDDING].to(self._dtype)
        return lambda tokens: embedding(tokens, weight)

    @torch.no_grad()
    def quantize(self, index: int) -> BlockFound:
        """Quantize block `index`, before which the streams stand."""
        self._load(index)
        lanes = self.lanes
        return self._block_search.run(index, lanes.quantized, lanes.moments, lanes.restart)

    @torch.no_grad()
    def errors(self, index: int, candidates: Sequence[int]) -> list[list[LayerErrors]]:
        """What each number of bits would do to each stage's layers, on exact inputs."""
        self._load(index)
        return self._block_search.errors(index, self.lanes.exact, self.lanes.moments, candidates)

    @torch.no_grad()
    def advance(self) -> None:
        """Go on behind the block that was quantized last."""
        self.lanes.advance()

    def _load(self, index: int) -> None:
        for source, tensors in self._prefill.items():
            self.lanes.write_prompts(source, index, block_weights(tensors, index))
        self.lanes.load(index, block_weights(self._base, index))


def search_devices() -> list[torch.device]:
    """What a search runs on: every GPU that is visible, or the processor."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return gpus or [torch.device("cpu")]


def pieces_of(
    samples: Sequence[Sample], shares: Mapping[str, float], search: SearchConfig
) -> list[Piece]:
    """The samples as the decode module reads them, each source's positions by its share.

    As served, with some read whole beside them: how a text begins is seen there alone. Samples
    without a response are left out then.
    """
    if search.positions == "all":
        texts = whole_texts(samples, search.batch_tokens)
        return weighted(texts, shares, sum(piece.counted_positions for piece in texts))
    served = cut_as_served([one for one in samples if one.is_served], search.batch_tokens)
    positions = sum(piece.counted_positions for piece in served)
    pieces = weighted(served, shares, positions)
    if search.plain:
        texts = whole_texts(some_of(samples, PLAIN_TOKENS * positions), search.batch_tokens)
        pieces += weighted(texts, shares, search.plain * positions)
    return pieces
