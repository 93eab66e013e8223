"""TPOT of one model folder in vLLM's own engine, by batch and context; run by vLLM's interpreter.

    VLLM_PYTHON tests/gpu/tpot_worker.py FOLDER OUT --batches 1,8,64 --contexts 512,2048

The weights are dummies: TPOT does not depend on their values. Prompts are read once and stay in the
prefix cache; a batch is then timed with few and with many tokens, whose difference is decoding
alone. It imports nothing of qsun. OUT is JSON, written last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

FEW, MANY, ROUNDS = 8, 40, 3
VOCABULARY = 30_000  # fewer than any model's; drawn prompts need no more


def main() -> None:
    """Load, sweep, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", required=True)
    parser.add_argument("--contexts", required=True)
    parser.add_argument("--memory", type=float, default=0.92, help="share of the GPU's")
    parser.add_argument("--eager", action="store_true", help="no compilation: for a processor")
    asked = parser.parse_args()
    batches = sorted(map(int, asked.batches.split(",")))
    contexts = sorted(map(int, asked.contexts.split(",")))

    import torch
    import vllm

    llm = vllm.LLM(
        model=str(asked.folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(contexts) + MANY + 8,
        max_num_seqs=max(batches),
        enable_prefix_caching=True,
        gpu_memory_utilization=asked.memory,
        enforce_eager=asked.eager,
        seed=0,
    )
    tokens = kv_tokens(llm)
    rows, left_out = [], []
    for context in contexts:
        fitting = [one for one in batches if one * (context + MANY) <= tokens]
        left_out += [[one, context] for one in batches if one not in fitting]
        rows += list(timed(llm, context, fitting))
    found = {
        "rows": rows,
        "left_out": left_out,
        "kv_tokens": tokens,
        "few_many_tokens": [FEW, MANY],
        "rounds": ROUNDS,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bytes_per_s": bandwidth() if torch.cuda.is_available() else None,
    }
    scratch = asked.out.with_suffix(".partial")
    scratch.write_text(json.dumps(found, indent=1), encoding="utf-8")
    scratch.rename(asked.out)


def timed(llm: Any, context: int, batches: list[int]) -> Any:
    """Rows of one context: seconds a token while so many requests are decoded."""
    import torch
    from vllm import SamplingParams

    drawn = torch.randint(100, VOCABULARY, (max(batches, default=0), context)).tolist()
    prompts = [{"prompt_token_ids": one} for one in drawn]

    def seconds(batch: int, tokens: int) -> float:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begun = time.perf_counter()
        llm.generate(prompts[:batch], params, use_tqdm=False)
        return time.perf_counter() - begun

    for batch in batches:
        seconds(batch, FEW)  # reads what is not read yet
        gaps = [(seconds(batch, MANY) - seconds(batch, FEW)) / (MANY - FEW) for _ in range(ROUNDS)]
        yield {
            "batch": batch,
            "context_tokens": context + (FEW + MANY) // 2,
            "tpot_s": median(gaps),
        }
        print(f"batch {batch}, context {context}: {1000 * median(gaps):.2f} ms", flush=True)


def kv_tokens(llm: Any) -> int:
    """How many tokens the KV cache holds."""
    cache = llm.llm_engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks * cache.block_size)


def bandwidth() -> float:
    """Bytes a second that this GPU's memory gives to a read, as measured."""
    import torch

    values = torch.ones(2**31, dtype=torch.bfloat16, device="cuda")
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        values.sum(dtype=torch.float32)
        torch.cuda.synchronize()
        found.append(values.nbytes / (time.perf_counter() - begun))
    return max(found)


if __name__ == "__main__":
    main()
