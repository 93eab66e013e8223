"""Memory and disk of engine qsun: one block with its moments, and the streams beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsun.block import Stage
from qsun.config import SearchConfig
from qsun.packed_checkpoint import SHARD_BYTES
from qsun.quantize.block_perplexity import LOGITS_AT_ONCE
from qsun.quantize.plan import Plan

PROCESS_BYTES = 800_000_000  # Python with torch, transformers and compressed-tensors imported
CUDA_BYTES = 2_500_000_000  # its libraries and context
VALUE, FLOAT = 2, 4  # bytes: bfloat16 or float16, float32
MODULES_HELD = 5  # three, and all weights as float32, which count double
SQUARES_SUMMED = 2  # Gram and cross
SQUARES_SEARCHED = 7  # these, damped, inverse, ordered, factor and what is being computed
MATRICES_SEARCHED = 8  # of a stage's weights: wanted, rounded, missing and what is being computed


@dataclass(frozen=True)
class BlockMemory:
    """Bytes. `process` is there anyway, `block` is the most that any step holds beside it.

    `accelerator` is what each GPU holds. `streams` wait between two blocks, in memory or on disk;
    `standing` of them are kept for resuming.
    """

    process: int
    block: int
    accelerator: int
    streams: int
    standing: int

    @property
    def needed(self) -> int:
        """The least that a search can do with, its streams on disk."""
        return self.process + self.block


def block_memory(
    plan: Plan,
    config: Mapping[str, Any],
    other_bytes: int,
    samples: int,
    max_tokens: int,
    search: SearchConfig,
    on_gpu: bool,
) -> BlockMemory:
    """Reckon a search over `samples` texts of at most `max_tokens` tokens.

    `other_bytes` are those of all tensors of no quantized layer.
    """
    blocks, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    block_bytes = plan.weight_count // blocks * VALUE
    at_once = max(search.batch_tokens, max_tokens)
    activations = at_once * _position_bytes(config)
    held = MODULES_HELD * block_bytes
    searching = max(
        max(
            SQUARES_SEARCHED * inputs**2 + MATRICES_SEARCHED * inputs * outputs,
            SQUARES_SUMMED * inputs**2 + activations // FLOAT,
        )
        for inputs, outputs in stages(plan, blocks)
    )
    tables = int(config["vocab_size"]) * hidden * VALUE
    measuring = tables + 3 * LOGITS_AT_ONCE * FLOAT
    writing = min(other_bytes + plan.layer_bytes, SHARD_BYTES + tables)
    if plan.format == "awq":
        writing = other_bytes + plan.layer_bytes
    flows = 2 if search.sequential else 1
    tokens, attention, caches = samples * max_tokens, *_widths(config)
    standing = tokens * hidden * VALUE * flows
    within = tokens * attention * VALUE * flows
    if search.positions == "responses":
        standing += tokens * hidden * VALUE
        within += tokens * caches * VALUE
    working = max(held + searching * FLOAT, measuring)
    streams = standing + within
    if on_gpu:
        # From a module's file to the GPU, through memory.
        block = max(2 * block_bytes, tables, writing)
        return BlockMemory(PROCESS_BYTES + CUDA_BYTES, block, working, streams, standing)
    return BlockMemory(PROCESS_BYTES, max(working, writing), 0, streams, standing)


def stages(plan: Plan, blocks: int) -> list[tuple[int, int]]:
    """Inputs and outputs of what is searched together in a block."""
    found = []
    for stage in Stage:
        last = {name.rpartition(".")[2] for name in stage.value}
        ours = plan.layers[: len(plan.layers) // blocks]
        layers = [layer for layer in ours if layer.name.rpartition(".")[2] in last]
        if layers:
            found.append((layers[0].in_features, sum(layer.out_features for layer in layers)))
    return found


def _widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Values of a position that attention gives, and of its K and V."""
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return heads * size, 2 * int(config.get("num_key_value_heads") or heads) * size


def _position_bytes(config: Mapping[str, Any]) -> int:
    """What running a block holds of a position at once: gate, up, their product, and it summed."""
    intermediate, hidden = int(config["intermediate_size"]), int(config["hidden_size"])
    return intermediate * (3 * VALUE + 2 * FLOAT) + hidden * 4 * VALUE
