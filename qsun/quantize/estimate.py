"""The estimate: memory, disk and time of a quantization, before it starts and without weights.

Time is measured, not guessed: one decoder block of the model's own shape, with random weights, is
run and quantized once on this machine, and the search is so many of those. Memory is a sum of
what llm-compressor's AWQ holds at its peak.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qsun.quantize.plan import Plan
from qsun.skeleton import Skeleton, transformers_config

PROCESS_BYTES = 1_500_000_000  # Python with torch, transformers and llm-compressor imported
PATIENCE_S = 0.5
VALUE_BYTES = 2  # bfloat16 and float16
CLONES = 4  # of the widest smoothed pair: original, candidate, float32 candidate (counts double)


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to need.

    `search_s` covers the search alone. `needed_bytes` of memory are the least that a run can do
    with; engine qsun lays what waits between two blocks on disk where memory is short. Of a GPU's
    memory it needs `accelerator_bytes`.
    """

    memory_bytes: int
    disk_bytes: int
    checkpoint_bytes: int
    search_s: float
    needed_bytes: int = 0
    streams_on_disk: bool = False
    accelerator_bytes: int = 0


@dataclass(frozen=True)
class BlockTimes:
    """Seconds for one block: over one text, quantizing its weights once, moving them both ways."""

    forward_s: float
    quantize_s: float
    transfer_s: float


def estimate(
    plan: Plan,
    config: Mapping[str, Any],
    shape: Skeleton,
    samples: int,
    max_tokens: int,
    grid_points: int,
    converts: bool,
) -> Estimate:
    """Estimate a run over `samples` texts of at most `max_tokens` tokens.

    `converts` says that the base model is first written out as a Hugging Face folder.
    """
    other_bytes = (shape.parameters - plan.weight_count) * VALUE_BYTES
    checkpoint = plan.layer_bytes + other_bytes
    model_bytes = shape.parameters * VALUE_BYTES
    return Estimate(
        memory_bytes=_memory(config, model_bytes, samples, max_tokens),
        disk_bytes=checkpoint + (model_bytes if converts else 0),
        checkpoint_bytes=checkpoint,
        search_s=_search_s(plan, config, samples, max_tokens, grid_points),
    )


def _memory(config: Mapping[str, Any], model_bytes: int, samples: int, max_tokens: int) -> int:
    hidden, intermediate = int(config["hidden_size"]), int(config["intermediate_size"])
    tokens = samples * max_tokens
    # Inputs of attention, MLP and down_proj, the block's own input, and outputs before and after.
    activations = tokens * (5 * hidden + 2 * intermediate) * VALUE_BYTES
    clones = CLONES * 2 * hidden * intermediate * VALUE_BYTES
    logits = max_tokens * int(config["vocab_size"]) * 4 * 2
    return PROCESS_BYTES + model_bytes + activations + clones + logits


def _search_s(
    plan: Plan, config: Mapping[str, Any], samples: int, max_tokens: int, grid_points: int
) -> float:
    blocks = int(config["num_hidden_layers"])
    block = time_one_block(config, plan, max_tokens, "eager")  # as llm-compressor calibrates
    sizes = {
        layer.name.rpartition(".")[2]: layer.in_features * layer.out_features
        for layer in plan.layers
    }
    # Attention and MLP are re-run for their norms' scales, down_proj once more for up_proj's.
    rerun = 1 + sizes.get("down_proj", 0) / max(sum(sizes.values()), 1)
    forwards = (grid_points + 1) * rerun + 2
    searching_s = samples * forwards * block.forward_s + grid_points * block.quantize_s
    return blocks * (searching_s + block.transfer_s)


def time_one_block(
    config: Mapping[str, Any], plan: Plan, max_tokens: int, attention: str
) -> BlockTimes:
    """Run, quantize and move one block of random weights on this machine."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from transformers import AutoModelForCausalLM

    from qsun.rounding import round_to_nearest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = transformers_config(
        config, num_hidden_layers=1, vocab_size=256, pad_token_id=None, layer_types=None
    )
    model = AutoModelForCausalLM.from_config(
        tiny, dtype=torch.bfloat16, attn_implementation=attention
    )
    model = model.to(device).eval()
    tokens = torch.randint(0, 256, (1, max_tokens), device=device)
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    args = QuantizationArgs(**plan.arguments)

    def quantize() -> None:
        for weight in weights:
            round_to_nearest(weight, args)

    def write_back() -> None:
        for weight in weights:
            weight.to("cpu", copy=True)

    threads = threads_of(device)
    with torch.no_grad():
        return BlockTimes(
            forward_s=best_time(lambda: model.model(tokens), device) / threads,
            quantize_s=best_time(quantize, device, 2) / threads,
            # Each block's weights come from memory and go back there, smoothed.
            transfer_s=2 * best_time(write_back, device, 2) if device == "cuda" else 0.0,
        )


def best_time(work: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """Seconds that `work` takes, the least of so many times, or of as many as fit `PATIENCE_S`.

    On a processor it is the time of one thread, while that one ran: what else keeps the machine
    busy is no part of it, nor is waiting for threads that it keeps from running.
    """
    import torch

    clock = time.perf_counter if device == "cuda" else time.thread_time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    times: list[float] = []
    try:
        while len(times) < repeats and (not times or time.perf_counter() - begun < PATIENCE_S):
            start = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def threads_of(device: str) -> int:
    """How many threads share what `best_time` took one for, where products of matrices do."""
    import torch

    return 1 if device == "cuda" else torch.get_num_threads()
