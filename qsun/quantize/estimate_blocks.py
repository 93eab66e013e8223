"""The estimate for engine qsun: one block of the model's shape is run and searched, for its time.

On a processor, of a wide model a block of a fourth of its widths is searched: there the products of
matrices take the time, which grows with the third power. On a GPU launches do, and all is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from qsun.config import SearchConfig
from qsun.quantize.block_memory import block_memory, stages
from qsun.quantize.estimate import VALUE_BYTES, Estimate, best_time, threads_of, time_one_block
from qsun.quantize.plan import Plan
from qsun.scheme import candidate_bits
from qsun.skeleton import Skeleton

CONVERSION = 2  # of the model's bytes, while a GGUF file is read
PASSES = 4.2  # over a block: the prefill module's, and two decode modules' with parts taken twice
TABLE_PASSES = 2.2  # the prefill module's and an exact decode module's, for a table of errors
WIDE, SHRUNK = 1024, 4


def estimate_blocks(
    plan: Plan,
    config: Mapping[str, Any],
    shape: Skeleton,
    samples: int,
    max_tokens: int,
    search: SearchConfig,
    converts: bool,
    memory_limit: int,
) -> Estimate:
    """Estimate a search over `samples` texts of at most `max_tokens` tokens.

    `converts` says that the base model is first written out as a Hugging Face folder. Streams lie
    on disk where `memory_limit`, in bytes, does not hold them.
    """
    blocks = int(config["num_hidden_layers"])
    other_bytes = (shape.parameters - plan.weight_count) * VALUE_BYTES
    checkpoint = plan.layer_bytes + other_bytes
    model_bytes = shape.parameters * VALUE_BYTES if converts else 0
    on_gpu = torch.cuda.is_available()
    memory = block_memory(plan, config, other_bytes, samples, max_tokens, search, on_gpu)
    needed = max(memory.needed, memory.process + CONVERSION * model_bytes)
    on_disk = needed + memory.streams > memory_limit
    # Codes, a byte each, with a zero and a scale per group.
    kept_blocks = plan.weight_count + 3 * plan.weight_count // plan.group_size
    # Those kept last, and beside them what is to be kept next or waits for its next block.
    streams = memory.standing + (memory.streams if on_disk else memory.standing)
    block_s = time_one_block(config, plan, max_tokens, "sdpa").forward_s * samples
    block_s *= PASSES + (0 if plan.target_bits is None else TABLE_PASSES)
    return Estimate(
        memory_bytes=needed + (0 if on_disk else memory.streams),
        disk_bytes=checkpoint + kept_blocks + streams + model_bytes,
        checkpoint_bytes=checkpoint,
        search_s=blocks * (block_s + _search_one_block(plan, blocks, search)),
        needed_bytes=needed,
        streams_on_disk=on_disk,
        accelerator_bytes=memory.accelerator,
    )


def _search_one_block(plan: Plan, blocks: int, search: SearchConfig) -> float:
    from compressed_tensors.quantization import QuantizationArgs

    from qsun.quantize.bit_errors import layer_errors
    from qsun.quantize.layer_search import Inputs, search_layers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = QuantizationArgs(**plan.arguments)
    shapes = stages(plan, blocks)
    wide = max(inputs for inputs, _ in shapes) > WIDE * 2
    shrunk = SHRUNK if wide and device.type == "cpu" else 1
    seconds = 0.0
    for inputs, outputs in shapes:
        width = inputs // shrunk // plan.group_size * plan.group_size
        weight = torch.randn(outputs // shrunk, width, device=device)
        rows = torch.randn(2 * width, width, device=device)
        gram = rows.t() @ rows
        layers, known = {"one": weight}, Inputs(gram, gram)
        work = partial(search_layers, layers, known, args, search, torch.bfloat16)
        seconds += best_time(work, device.type)
        if plan.target_bits is not None:
            candidates = candidate_bits(plan.format, plan.stored_bits)
            table = partial(layer_errors, layers, gram, plan.scheme, candidates, torch.bfloat16)
            seconds += best_time(table, device.type)
    # Narrow layers are searched in operations too small to share.
    return seconds if shrunk == 1 else seconds * shrunk**3 / threads_of(device.type)
