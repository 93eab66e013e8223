"""Time training steps: through the hand-off, full fine-tuning, and a plain padded loop.

    python -m tests.gpu.tuning_speed CONFIG TASK RECORD [--rows N] [--rounds N]

Every variant sees the same rows in random batches of 32 (and, where named so, 128), does whole
steps (forward, backward, clipping, AdamW) and is timed in turn, round after round; the record keeps
every round. Tokens are prompt and response tokens without padding. Needs a CUDA GPU with 40 GB.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from qsun.config import TuneConfig, load_config
from qsun.models import load_model, load_tokenizer
from qsun.records import new_record
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_task
from qsun.tune.batches import MicroBatches, Row, encode_examples, model_inputs
from qsun.tune.modules import TunedModules, trainable
from qsun.tune.precision import compute_in

WARM_UP = 3
Step = Callable[[Sequence[Row]], None]


def stepper(model: torch.nn.Module, loss_of: Callable[[Sequence[Row]], torch.Tensor]) -> Step:
    """One whole training step on `model`'s trainable weights."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def step(rows: Sequence[Row]) -> None:
        torch.autograd.backward(loss_of(rows))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def qsun_step(base: Path, settings: TuneConfig, system: str, compiled: bool = True) -> Step:
    """A step as `qsun tune` does it."""
    decode = load_model(base, "bfloat16").cuda()
    prefill = trainable(load_model(base, "bfloat16"), settings).cuda()
    for module in (prefill, decode):
        compute_in(module, torch.bfloat16, compiled=compiled)
    reader = decode if system == "sun" else None
    modules = TunedModules(prefill, reader, None, settings, compiled=compiled).train()

    def loss_of(rows: Sequence[Row]) -> torch.Tensor:
        inputs = {name: tensor.cuda() for name, tensor in model_inputs(rows).items()}
        loss: torch.Tensor = modules(**inputs)["loss"]
        return loss

    return stepper(prefill, loss_of)


def plain_step(base: Path) -> Step:
    """The loop one writes first: autocast, both modules padded to the longest, all logits."""
    decode = load_model(base, "bfloat16").cuda()
    prefill = load_model(base, "bfloat16").float().cuda().requires_grad_(True).train()

    def loss_of(rows: Sequence[Row]) -> torch.Tensor:
        inputs = {name: tensor.cuda() for name, tensor in model_inputs(rows).items()}
        prompts, lengths, labels = (inputs[k] for k in ("prompts", "prompt_lengths", "labels"))
        columns = torch.arange(prompts.shape[1], device="cuda")
        mask = (columns < lengths[:, None] - 1).long()
        with torch.autocast("cuda", torch.bfloat16):
            cache = prefill(prompts, attention_mask=mask, use_cache=True).past_key_values
            handed = DynamicCache()
            for index, layer in enumerate(cache.layers):
                handed.update(layer.keys.bfloat16(), layer.values.bfloat16(), index)
            last = prompts.gather(1, lengths[:, None] - 1)
            read = torch.cat([last, labels[:, :-1].clamp(min=0)], dim=1)
            logits = decode(
                read,
                attention_mask=torch.cat([mask, torch.ones_like(read)], dim=1),
                position_ids=lengths[:, None] - 1 + torch.arange(read.shape[1], device="cuda"),
                past_key_values=handed,
            ).logits.float()
        loss: torch.Tensor = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        return loss

    return stepper(prefill, loss_of)


def batches_of(rows: Sequence[Row], size: int, grouped: bool) -> list[list[Row]]:
    """Batches in qsun's order, or in a random one."""
    if grouped:
        ordered = MicroBatches(rows, size, size, epochs=1, seed=0)
        return [ordered[index] for index in range(len(ordered))]
    mixed = random.Random(0).sample(list(rows), len(rows))
    return [mixed[start : start + size] for start in range(0, len(mixed) - size + 1, size)]


def timed(step: Step, batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Seconds a step and tokens a second over all batches."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for rows in batches:
        step(rows)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    tokens = sum(len(row) for rows in batches for row in rows)
    return {"step_ms": 1000 * seconds / len(batches), "tokens_per_s": tokens / seconds}


def main() -> None:
    """Measure all variants and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    run = load_config(arguments.config)
    base = (arguments.config.parent / run.base.model).resolve()
    task = load_task(arguments.task)
    tokenizer = load_tokenizer(base)
    examples = read_task(task, arguments.task.parent, arguments.rows).train
    rows = encode_examples(examples, tokenizer, task.max_tokens, task.name).rows
    full, lora = replace(run.tune, module="full"), replace(run.tune, module="lora")
    variants: dict[str, tuple[Step, list[list[Row]]]] = {
        "plain loop, batch 32": (plain_step(base), batches_of(rows, 32, grouped=False))
    }
    for size in (32, 128):
        grouped = batches_of(rows, size, grouped=True)
        variants[f"sun full, batch {size}"] = qsun_step(base, full, "sun"), grouped
        variants[f"full-ft, batch {size}"] = qsun_step(base, full, "full-ft"), grouped
    grouped = batches_of(rows, 32, grouped=True)
    variants["sun full, not compiled, batch 32"] = (
        qsun_step(base, full, "sun", compiled=False),
        grouped,
    )
    variants["sun lora, batch 32"] = qsun_step(base, lora, "sun"), grouped
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(arguments.rounds):
        for name, (step, batches) in variants.items():
            if number == 0:
                timed(step, batches[:WARM_UP])
            rounds[name].append(timed(step, batches))
            print(number, name, rounds[name][-1], flush=True)
    medians = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in rounds.items()
    }
    for name, found in medians.items():
        print(f"{name:24} {found['step_ms']:8.1f} ms {found['tokens_per_s']:10.0f} tokens/s")
    result: dict[str, Any] = {"rows": len(rows), "medians": medians, "rounds": rounds}
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    new_record("tuning-speed", run, run.seed, result).write(arguments.record)
    print(json.dumps({"record": str(arguments.record)}))


if __name__ == "__main__":
    main()
