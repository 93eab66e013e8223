"""The estimate for engine qsun: one block of the model's shape is run and searched, once.

Of a wide model a block of a fourth of its widths is searched: there the products of matrices take
the time, which grows with the third power.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qsun.config import SearchConfig
from qsun.quantize.estimate import PROCESS_BYTES, VALUE_BYTES, Estimate, time_one_block
from qsun.quantize.plan import Plan
from qsun.scheme import candidate_bits
from qsun.skeleton import Skeleton

PASSES = 4.2  # over a block: the prefill module's, and two decode modules' with parts taken twice
TABLE_PASSES = 2.2  # the prefill module's and an exact decode module's, for a table of errors
BLOCKS_HELD = 4  # three modules' and the weights as float32, which count double
SQUARES_HELD = 7  # Gram, cross, damped, inverse, ordered, factor and what is being computed
WIDE, SHRUNK = 1024, 4


def estimate_blocks(
    plan: Plan,
    config: Mapping[str, Any],
    shape: Skeleton,
    samples: int,
    max_tokens: int,
    search: SearchConfig,
    converts: bool,
) -> Estimate:
    """Estimate a search over `samples` texts of at most `max_tokens` tokens.

    `converts` says that the base model is first written out as a Hugging Face folder.
    """
    blocks = int(config["num_hidden_layers"])
    other_bytes = (shape.parameters - plan.weight_count) * VALUE_BYTES
    checkpoint = plan.layer_bytes + other_bytes
    model_bytes = shape.parameters * VALUE_BYTES
    block_s = time_one_block(config, plan, max_tokens).forward_s * samples
    block_s *= PASSES + (0 if plan.target_bits is None else TABLE_PASSES)
    return Estimate(
        memory_bytes=_memory(plan, config, model_bytes, blocks, samples * max_tokens, max_tokens),
        disk_bytes=checkpoint + plan.weight_count + (model_bytes if converts else 0),
        checkpoint_bytes=checkpoint,
        search_s=blocks * (block_s + _search_one_block(plan, blocks, search)),
    )


def _memory(
    plan: Plan,
    config: Mapping[str, Any],
    model_bytes: int,
    blocks: int,
    tokens: int,
    text_tokens: int,
) -> int:
    block_bytes = plan.weight_count // blocks * VALUE_BYTES
    widest = max(layer.in_features for layer in plan.layers)
    # Three streams' states and two of attention's outputs.
    states = tokens * int(config["hidden_size"]) * VALUE_BYTES * 5
    searching = BLOCKS_HELD * block_bytes + SQUARES_HELD * widest**2 * 4 + states
    measuring = model_bytes + text_tokens * int(config["vocab_size"]) * 4 * 2
    return PROCESS_BYTES + max(searching, measuring)


def _search_one_block(plan: Plan, blocks: int, search: SearchConfig) -> float:
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    from qsun.quantize.bit_errors import layer_errors
    from qsun.quantize.layer_search import Inputs, search_layers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = QuantizationArgs(**plan.arguments)
    stages: dict[int, int] = {}
    for layer in plan.layers[: len(plan.layers) // blocks]:
        stages[layer.in_features] = stages.get(layer.in_features, 0) + layer.out_features
    shrunk = SHRUNK if max(stages) > WIDE * 2 else 1
    seconds = 0.0
    for inputs, outputs in stages.items():
        width = inputs // shrunk // plan.group_size * plan.group_size
        weight = torch.randn(outputs // shrunk, width, device=device)
        rows = torch.randn(2 * width, width, device=device)
        gram = rows.t() @ rows
        start = time.perf_counter()
        search_layers({"one": weight}, Inputs(gram, gram), args, search, torch.bfloat16)
        if plan.target_bits is not None:
            candidates = candidate_bits(plan.format, plan.stored_bits)
            layer_errors({"one": weight}, gram, plan.scheme, candidates, torch.bfloat16)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
    return seconds * shrunk**3
