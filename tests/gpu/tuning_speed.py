"""Time training steps: through the hand-off, full fine-tuning, and a plain padded loop.

    python -m tests.gpu.tuning_speed CONFIG TASK RECORD [--rounds N]

Every variant sees the same 1,024 rows in batches of 32 or 128, does whole steps (forward, backward,
clipping, AdamW) and is timed in turn, round after round; the record keeps every round. Then 12,000
rows are trained on once, new CUDA graphs included. Tokens are prompt and response tokens without
padding. Needs a CUDA GPU with 60 GB.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from qsun.config import TuneConfig, load_config
from qsun.models import checkpoint_folder, load_model, load_tokenizer, locate, read_config
from qsun.records import new_record
from qsun.skeleton import skeleton
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_task
from qsun.tune.batches import MicroBatches, Row, encode_examples, model_inputs
from qsun.tune.graphs import SHAPE_STEP, StepGraphs
from qsun.tune.modules import TunedModules, trainable
from qsun.tune.precision import compute_in

TIMED_ROWS, EPOCH_ROWS = 1024, 12_000
LARGEST_DIFFERENCE = 1e-3  # of the gradients' norm; or twice what two ordinary passes differ by
WARM_UPS = 2  # passes: a shape is captured when it comes back
Step = Callable[[Sequence[Row]], None]


def stepper(
    model: torch.nn.Module,
    backward: Callable[[Sequence[Row]], object],
    zero_grad: Callable[[], None],
) -> Step:
    """One whole training step on `model`'s trainable weights."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def step(rows: Sequence[Row]) -> None:
        backward(rows)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        zero_grad()

    return step


def modules_of(base: Path, settings: TuneConfig, system: str) -> TunedModules:
    """What `qsun tune` trains."""
    compiled = settings.compile != "off"
    decode = load_model(base, "bfloat16").cuda()
    prefill = trainable(load_model(base, "bfloat16"), settings).cuda()
    for module in (prefill, decode):
        compute_in(module, torch.bfloat16, compiled=compiled)
    reader = decode if system == "sun" else None
    return TunedModules(prefill, reader, None, settings, compiled=compiled).train()


def graph_differences(modules: TunedModules, batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    """How far the gradients of two accumulated batches differ with CUDA graphs and without.

    The norm of the difference over the norm, the largest of all pairs of batches, each met when
    its shapes are new, when they are captured and when they are replayed; beside it the same
    between two ordinary passes, whose kernels add up in no fixed order.
    """
    graphs, worst = StepGraphs(modules), {"graphs": 0.0, "ordinary": 0.0}
    weights = [weight for weight in modules.prefill.parameters() if weight.requires_grad]

    def gradients(
        pair: Sequence[Sequence[Row]],
        backward: Callable[[dict[str, torch.Tensor], torch.Tensor], object],
    ) -> torch.Tensor:
        modules.zero_grad()
        for rows in pair:
            inputs = {name: one.cuda() for name, one in model_inputs(rows, SHAPE_STEP).items()}
            backward(inputs, inputs["labels"].ge(0).sum())
        return torch.cat([one.grad.flatten() for one in weights if one.grad is not None])

    def plainly(inputs: dict[str, torch.Tensor], count: torch.Tensor) -> None:
        torch.autograd.backward(modules(**inputs, num_items_in_batch=count)["loss"])

    for _ in range(3):
        for pair in zip(batches[::2], batches[1::2], strict=False):
            wanted = gradients(pair, plainly)
            for name, backward in (("graphs", graphs), ("ordinary", plainly)):
                difference = gradients(pair, backward) - wanted
                worst[name] = max(worst[name], float(difference.norm() / wanted.norm()))
    return worst


def qsun_step(base: Path, settings: TuneConfig, system: str) -> Step:
    """A step as `qsun tune` does it."""
    modules = modules_of(base, settings, system)
    prefill = modules.prefill
    graphs = StepGraphs(modules) if settings.cuda_graphs else None

    def backward(rows: Sequence[Row]) -> None:
        shape_step = SHAPE_STEP if graphs is not None else 1
        inputs = {name: one.cuda() for name, one in model_inputs(rows, shape_step).items()}
        count = inputs["labels"].ge(0).sum()
        if graphs is not None:
            graphs(inputs, count)
        else:
            torch.autograd.backward(modules(**inputs, num_items_in_batch=count)["loss"])

    return stepper(prefill, backward, modules.zero_grad)


def plain_step(base: Path) -> Step:
    """The loop one writes first: autocast, both modules padded to the longest, all logits."""
    decode = load_model(base, "bfloat16").cuda()
    prefill = load_model(base, "bfloat16").float().cuda().requires_grad_(True).train()

    def backward(rows: Sequence[Row]) -> None:
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
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        torch.autograd.backward(loss)

    return stepper(prefill, backward, prefill.zero_grad)


def batches_of(rows: Sequence[Row], size: int, grouped: bool = True) -> list[list[Row]]:
    """Batches in qsun's order, or in a random one."""
    if grouped:
        ordered = MicroBatches(rows, size, size, epochs=1, seed=0)
        return [ordered[index] for index in range(len(ordered))]
    mixed = random.Random(0).sample(list(rows), len(rows))
    return [mixed[start : start + size] for start in range(0, len(mixed) - size + 1, size)]


def timed(step: Step, batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Seconds in all, milliseconds a step and tokens a second over all batches."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for rows in batches:
        step(rows)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    tokens = sum(len(row) for rows in batches for row in rows)
    return {
        "seconds": seconds,
        "step_ms": 1000 * seconds / len(batches),
        "tokens_per_s": tokens / seconds,
    }


def main() -> None:
    """Measure all variants; the record is written after every round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    run = load_config(arguments.config)
    source = locate(run.base.model, run.base.revision, arguments.config.parent)
    shape, scratch = skeleton(read_config(source)), tempfile.mkdtemp()
    base = checkpoint_folder(source, shape, Path(scratch), "bfloat16")
    task = load_task(arguments.task)
    examples = read_task(task, arguments.task.parent, EPOCH_ROWS).train
    every = encode_examples(examples, load_tokenizer(base), task.max_tokens, task.name).rows
    rows = every[:TIMED_ROWS]
    full = replace(run.tune, module="full", cuda_graphs=False)
    graphs = replace(full, cuda_graphs=True)
    lora = replace(run.tune, module="lora", cuda_graphs=True)
    variants: dict[str, tuple[Step, list[list[Row]]]] = {
        "plain loop, batch 32": (plain_step(base), batches_of(rows, 32, grouped=False))
    }
    for name, settings, system, size in (
        ("sun, CUDA graphs, batch 32", graphs, "sun", 32),
        ("full-ft, CUDA graphs, batch 32", graphs, "full-ft", 32),
        ("sun, batch 128", full, "sun", 128),
        ("full-ft, batch 128", full, "full-ft", 128),
        ("sun, batch 32", full, "sun", 32),
        ("full-ft, batch 32", full, "full-ft", 32),
        ("sun LoRA, CUDA graphs, batch 32", lora, "sun", 32),
    ):
        variants[name] = qsun_step(base, settings, system), batches_of(rows, size)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    differing = graph_differences(modules_of(base, graphs, "sun"), batches_of(rows, 32)[:8])
    print(differing, flush=True)
    if not differing["graphs"] < max(LARGEST_DIFFERENCE, 2 * differing["ordinary"]):
        raise SystemExit(f"gradients with CUDA graphs differ by more than their noise: {differing}")
    result: dict[str, Any] = {"rows": len(rows), "graph_differences": differing, "rounds": rounds}

    def write() -> None:
        result["medians"] = {
            name: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for name, found in rounds.items()
            if found
        }
        new_record("tuning-speed", run, run.seed, result).write(arguments.record)

    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.rounds):
        for name, (step, batches) in variants.items():
            for _ in range(WARM_UPS if number == 0 else 0):
                timed(step, batches)
            rounds[name].append(timed(step, batches))
            print(number, name, rounds[name][-1], flush=True)
        write()
    variants.clear()
    result["epoch"] = {
        f"sun{', CUDA graphs' if settings.cuda_graphs else ''}, batch {size}": timed(
            qsun_step(base, settings, "sun"), batches_of(every, size)
        )
        | {"rows": len(every)}
        for settings, size in ((graphs, 32), (full, 128))
    }
    print(result["epoch"])
    write()


if __name__ == "__main__":
    main()
