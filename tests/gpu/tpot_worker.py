"""TPOT of one model folder in vLLM's own engine, by batch and context; run by vLLM's interpreter.

    VLLM_PYTHON tests/gpu/tpot_worker.py FOLDER OUT --batches 1,8,64 --contexts 512,2048

The weights are dummies, and vLLM's DecodeBenchConnector fills the prompts' caches with drawn values
instead of reading prompts: TPOT depends on neither. It imports nothing of qsun. With `--turn` it
says that it is loaded by a file OUT.ready, and times nothing before there is OUT.go: several load
on a GPU at once, and are timed one by one. OUT is JSON, written last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

STEPS, ROUNDS = 24, 2
FIRST_STEPS = 8  # while the batch fills up, and caches with it
STEP_TOKENS = 2048  # no prompt is read: less memory than by default
VOCABULARY = 30_000  # fewer than any model's; drawn prompts need no more
FILLED = {"fill_mean": 0.0, "fill_std": 0.5}
LOOK_S = 0.1


def main() -> None:
    """Load, sweep, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", required=True)
    parser.add_argument("--contexts", required=True)
    parser.add_argument("--backend", default="auto", help="vLLM's --linear-backend")
    parser.add_argument(
        "--cache-bytes", type=int, help="of the KV cache; else what vLLM finds free"
    )
    parser.add_argument("--turn", action="store_true", help="wait for OUT.go once loaded")
    parser.add_argument("--eager", action="store_true", help="no compilation: for a processor")
    asked = parser.parse_args()
    batches = sorted(map(int, asked.batches.split(",")))
    contexts = sorted(map(int, asked.contexts.split(",")))

    import torch
    import vllm

    on_gpu, sized = torch.cuda.is_available(), asked.cache_bytes
    llm = vllm.LLM(
        model=str(asked.folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(contexts) + FIRST_STEPS + STEPS + 8,
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(STEP_TOKENS, *batches),
        enable_prefix_caching=False,
        # While others load, what vLLM finds free is not its own to take.
        **(
            {}
            if sized is None
            else {"kv_cache_memory_bytes": sized, "gpu_memory_utilization": 0.01}
        ),
        enforce_eager=asked.eager,
        linear_backend=asked.backend,
        kv_transfer_config={
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": FILLED,
        },
        seed=0,
    )
    if asked.turn:
        asked.out.with_suffix(".ready").touch()
        while not asked.out.with_suffix(".go").exists():
            time.sleep(LOOK_S)
    timed(llm, batches[0], contexts[0])  # what the first steps compile is not timed
    tokens = kv_tokens(llm)
    rows, left_out = [], []
    for context in contexts:
        for batch in batches:
            if batch * (context + FIRST_STEPS + STEPS) > tokens:
                left_out.append([batch, context])
            else:
                rows.append(timed(llm, batch, context))
    found = {
        "rows": rows,
        "left_out": left_out,
        "kv_tokens": tokens,
        "steps": STEPS,
        "rounds": ROUNDS,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "accelerator": torch.cuda.get_device_name() if on_gpu else None,
        "bytes_per_s": bandwidth() if on_gpu else None,
    }
    scratch = asked.out.with_suffix(".partial")
    scratch.write_text(json.dumps(found, indent=1), encoding="utf-8")
    scratch.rename(asked.out)


def timed(llm: Any, batch: int, context: int) -> dict[str, Any]:
    """The median time of a step in which the whole batch gets a token; and each round's."""
    rounds = [list(step_gaps(llm.llm_engine, batch, context)) for _ in range(ROUNDS)]
    tpot = median(gap for gaps in rounds for gap in gaps)
    print(f"batch {batch}, context {context}: {1000 * tpot:.3f} ms", flush=True)
    return {
        "batch": batch,
        "context_tokens": context + FIRST_STEPS + STEPS // 2,
        "tpot_s": tpot,
        "rounds_s": [median(gaps) for gaps in rounds],
    }


def step_gaps(engine: Any, batch: int, context: int) -> Iterator[float]:
    """Seconds between answers of steps that the whole batch took part in."""
    import torch
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=FIRST_STEPS + STEPS,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    for index, prompt in enumerate(torch.randint(100, VOCABULARY, (batch, context)).tolist()):
        engine.add_request(f"{index}", {"prompt_token_ids": prompt}, params)
    times, whole = [], []
    while engine.has_unfinished_requests():
        answered = engine.step()
        times.append(time.perf_counter())
        whole.append(len(answered) == batch)
    full = [index for index in range(1, len(times)) if whole[index - 1] and whole[index]]
    if len(full) < STEPS // 2:
        raise RuntimeError(f"of {len(times)} steps, {len(full)} answered all of {batch} requests")
    yield from (times[index] - times[index - 1] for index in full[-STEPS:])


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
