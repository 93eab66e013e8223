"""Measuring what engine qsun quantizes: perplexities of held-out text, kept with the search."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs

from qsun.block import Weights
from qsun.calibrate.samples import SampleSet
from qsun.checkpoint_files import Tensors
from qsun.decode_checkpoint import DecodeCheckpoint
from qsun.jobs.prepare import Prepared
from qsun.jobs.search_state import SearchState
from qsun.models import check_values, serving_dtype
from qsun.progress import announce
from qsun.quantize.block_perplexity import RoundedWeights, perplexity_by_blocks


class Measuring:
    """Perplexities over the held-out text, each measured once for a search and this text."""

    def __init__(self, prepared: Prepared, heldout: SampleSet, state: SearchState) -> None:
        self._prepared, self._heldout, self._state = prepared, heldout, state
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._known = state.measured(heldout.digest)

    def base(self, folder: Path) -> None:
        """Measure the base model, in full precision and rounded to nearest.

        Raises:
            ModelError: it holds values that are no numbers.
        """
        if {"full_precision", "round_to_nearest"} <= self._known.keys():
            return
        announce("measuring the base model")
        dtype = serving_dtype(self._prepared.model_config)
        check_values(folder, dtype)
        scheme = self._prepared.plan.scheme
        layers = {
            layer.name: QuantizationArgs(**scheme.arguments(scheme.bits_of(layer.name)))
            for layer in self._prepared.plan.layers
        }
        with Tensors(folder) as tensors:
            rounded = RoundedWeights(tensors, layers, getattr(torch, dtype), self._device)
            self._measure("full_precision", tensors)
            self._measure("round_to_nearest", rounded)

    def quantized(self, folder: Path) -> dict[str, float]:
        """Measure the module in `folder`, too; gives all three."""
        with DecodeCheckpoint(folder) as checkpoint:
            self._measure("quantized", checkpoint)
        return self._known

    def _measure(self, name: str, weights: Weights) -> None:
        if name in self._known:
            return
        with self._state.shelf(self._prepared.estimate.streams_on_disk) as shelf:
            self._known[name] = perplexity_by_blocks(
                weights,
                self._prepared.model_config,
                self._device,
                self._heldout.tokens,
                shelf,
                f"perplexity, {name.replace('_', ' ')}",
            )
        self._state.keep_measured(self._heldout.digest, self._known)
