"""Choosing bits: one walk over the blocks for a table of errors, then each layer's own bits.

The walk is on full-precision inputs, so that no layer's errors depend on another's bits. It holds
one block in memory, as the search does, and keeps no moments; the table is kept for a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qsun.calibrate.samples import Sample, SampleSet
from qsun.jobs.block_walk import BlockWalk, search_devices
from qsun.jobs.prepare import Prepared
from qsun.jobs.quantize_blocks import searched_samples
from qsun.jobs.search_state import SearchState
from qsun.progress import announce, bar
from qsun.quantize.bit_allocation import allocate
from qsun.quantize.bit_errors import LayerErrors, stage_losses
from qsun.scheme import candidate_bits


def choose_bits(
    prepared: Prepared, base: Path, calibration: SampleSet, state: SearchState
) -> Prepared:
    """The same with a plan in which every layer has its own bits."""
    target = prepared.plan.target_bits
    assert target is not None
    table = state.errors()
    if table is None:
        samples = searched_samples(prepared, calibration)
        announce(f"measuring what each number of bits would cost, over {len(samples)} samples")
        table = [
            [asdict(one) for one in stage] for stage in _measured(prepared, base, samples, state)
        ]
        state.keep_errors(table)
    bits = allocate([stage_losses(_read(stage)) for stage in table], target)
    return replace(prepared, plan=prepared.plan.with_bits(bits))


def _measured(
    prepared: Prepared, base: Path, samples: Sequence[Sample], state: SearchState
) -> list[list[LayerErrors]]:
    settings = prepared.settings
    exact = replace(settings, search=replace(settings.search, sequential=False))
    candidates = candidate_bits(settings.format, settings.stored_bits)
    blocks, found = int(prepared.model_config["num_hidden_layers"]), []
    prepared = replace(prepared, settings=exact)
    with (
        state.shelf(prepared.estimate.streams_on_disk) as shelf,
        BlockWalk(prepared, base, samples, shelf, search_devices()) as walk,
        bar("errors, block by block", blocks) as shown,
    ):
        for index in range(blocks):
            found += walk.errors(index, candidates)
            walk.advance()
            shown.update(1)
    return found


def _read(stage: Sequence[dict[str, Any]]) -> list[LayerErrors]:
    """Layers of the table as plain values, whose keys JSON has made text of."""
    return [
        LayerErrors(**one | {"errors": {int(bits): error for bits, error in one["errors"].items()}})
        for one in stage
    ]
