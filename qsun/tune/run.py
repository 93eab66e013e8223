"""The tuning run: modules in, a tuned prefill module and its measurements out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qsun.chats import encode_prompts
from qsun.checkpoint_files import read_config_file
from qsun.config import RunConfig
from qsun.decode_checkpoint import load_dequantized
from qsun.errors import ConfigError, DataError, Interrupted, ResourceError, bullet_list
from qsun.files import GIB, write_json
from qsun.handoff import Boundary
from qsun.models import load_model, load_tokenizer
from qsun.prefill_module import save_prefill
from qsun.processes import count, rank
from qsun.progress import announce
from qsun.tasks.definition import TaskDefinition
from qsun.tasks.examples import TaskData
from qsun.tune.batches import Encoded, MicroBatches, encode_examples, padding_share
from qsun.tune.judge import Judge
from qsun.tune.modules import TunedModules, trainable
from qsun.tune.precision import as_served, compute_in
from qsun.tune.trainer import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_TESTS = "base-tests.json"


@dataclass(frozen=True)
class Checkpoints:
    """The folders of the modules; `decode` is a quantized module, `teacher` a dense one."""

    base: Path
    decode: Path | None
    teacher: Path | None


@dataclass(frozen=True)
class Work:
    """One tuning: what is trained, on what, and where it grows."""

    run: RunConfig
    system: str
    task: TaskDefinition
    data: TaskData
    checkpoints: Checkpoints
    dtype: str
    folder: Path
    resume: bool


def tune(work: Work, out: Path) -> dict[str, Any]:
    """Train, write the prefill module to `out`, and measure it; returns the record's result.

    Raises:
        DataError: no response tokens are left.
        ResourceError: the accelerator's memory ran out.
        Interrupted: the user stopped it; a checkpoint waits in `work.folder`.
    """
    try:
        return _tune(work, out)
    except torch.OutOfMemoryError as error:
        tune = work.run.tune
        raise ResourceError(
            f"the accelerator's memory ran out at tune.micro_batch_size {tune.micro_batch_size}, "
            f"tune.generation_batch_size {tune.generation_batch_size}.\n"
            "Lower them, or set tune.gradient_checkpointing=true or tune.module=lora; then go on "
            "with --resume where a checkpoint was kept."
        ) from error


def _tune(work: Work, out: Path) -> dict[str, Any]:
    settings = work.run.tune
    dtype = getattr(torch, work.dtype)
    device = torch.device("cuda", rank()) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = load_tokenizer(work.checkpoints.base)
    announce("tokenizing the task's rows")
    encoded = {
        split: encode_examples(
            getattr(work.data, split), tokenizer, work.task.max_tokens, f"{work.task.name} {split}"
        )
        for split in ("train", "validation")
    }
    batches = _batches(encoded["train"], work)
    prompts = {
        name: encode_prompts([(one.messages, one.source) for one in examples], tokenizer)
        for name, examples in work.data.tests.items()
    }
    context_tokens = read_config_file(work.checkpoints.base / "config.json")[
        "max_position_embeddings"
    ]
    _check_room(prompts, work.task, context_tokens)
    validation_prompts = encode_prompts(
        [(one.messages, one.source) for one in work.data.validation], tokenizer
    )

    announce("loading the modules")
    base = load_model(work.checkpoints.base, work.dtype).to(device)
    decode = base
    if work.system == "qsun" and work.checkpoints.decode is not None:
        decode = load_dequantized(work.checkpoints.decode).to(device)
    teacher = None
    if work.checkpoints.teacher is not None:
        teacher = load_model(work.checkpoints.teacher, work.dtype).to(device)
    judge = Judge(
        work.task,
        tokenizer,
        Boundary(settings.boundary),
        settings.micro_batch_size,
        settings.generation_batch_size,
    )
    tests: dict[str, Any] = {}
    if settings.test and settings.test_base and prompts:
        tests["base"] = _base_tests(work, judge, base, prompts)

    _seed(work.run.seed)
    prefill = trainable(load_model(work.checkpoints.base, work.dtype), settings).to(device)
    alone = work.system == "full-ft"
    reader = prefill if alone else decode
    compiled = settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")
    for module in {prefill, reader}:
        compute_in(
            module,
            dtype,
            gradient_checkpointing=settings.gradient_checkpointing,
            compiled=compiled,
        )
    modules = TunedModules(prefill, None if alone else decode, teacher, settings, compiled=compiled)

    def evaluation() -> dict[str, float]:
        with as_served(dtype, prefill, reader):
            metrics = {"loss": judge.loss(prefill, reader, encoded["validation"].rows)}
            if work.task.checker is not None and _answered(work.data):
                made = judge.responses(prefill, reader, validation_prompts)
                metrics["accuracy"] = judge.accuracy(made, work.data.validation).share
        _release_memory()
        return metrics

    announce(f"tuning {work.task.name} as {work.system}: {batches.steps} steps")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trained = train(work.run, modules, batches, evaluation, work.folder, work.resume)
    if trained is None:
        raise Interrupted(
            f"interrupted; nothing was published. A checkpoint waits in {work.folder}: the same "
            "command with --resume goes on from it."
        )
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    if rank() == 0:
        save_prefill(prefill, out, dtype, work.run.base.model)
        if settings.module == "full":
            tokenizer.save_pretrained(out)
    announce("measuring what was tuned")
    with as_served(dtype, prefill, reader, base):
        losses = {work.system: judge.loss(prefill, reader, encoded["validation"].rows)}
        if alone:
            losses["naive"] = judge.loss(prefill, base, encoded["validation"].rows)
        if settings.test:
            tests[work.system] = judge.tests(prefill, reader, work.data.tests, prompts)
            if alone:
                tests["naive"] = judge.tests(prefill, base, work.data.tests, prompts)
        losses["base"] = judge.loss(base, base, encoded["validation"].rows)
    tokens = sum(map(len, encoded["train"].rows)) * settings.epochs
    return {
        "system": work.system,
        "module": settings.module,
        "boundary": settings.boundary,
        "task": {"name": work.task.name, "checker": work.task.checker, **work.data.summary()},
        "rows": {split: found.summary() for split, found in encoded.items()},
        "trained_weights": sum(weight.numel() for weight in modules.trained_weights().values()),
        "training": trained
        | {
            "tokens": tokens,
            "padding_share": round(padding_share(encoded["train"].rows, batches), 4),
            "processes": count(),
            "accelerator_gib": None if peak is None else round(peak, 2),
        },
        "evaluations": _evaluations(work.folder),
        "validation_loss": losses,
        "tests": tests,
    }


def _batches(encoded: Encoded, work: Work) -> MicroBatches:
    settings = work.run.tune
    batches = MicroBatches(
        encoded.rows,
        settings.batch_size,
        settings.micro_batch_size,
        settings.epochs,
        work.run.seed,
    )
    if not batches.steps:
        raise ConfigError(
            f"tune.batch_size {settings.batch_size} is more than all "
            f"{len(encoded.rows) * settings.epochs} training rows: lower it"
        )
    return batches


def _check_room(
    prompts: dict[str, list[list[int]]], task: TaskDefinition, context_tokens: int
) -> None:
    """Refuse tests whose responses would leave the model's context."""
    room = context_tokens - task.max_new_tokens
    too_long = {
        name: sum(len(prompt) > room for prompt in every) for name, every in prompts.items()
    }
    problems = [f"{name}: {count} prompts" for name, count in too_long.items() if count]
    if problems:
        raise DataError(
            f"task {task.name}: max_new_tokens {task.max_new_tokens} is more than these tests "
            f"leave of the model's {context_tokens} tokens:\n{bullet_list(problems)}\n"
            "Lower max_new_tokens, or leave these tests out."
        )


def _answered(data: TaskData) -> bool:
    return all(example.answer for example in data.validation)


def _base_tests(
    work: Work, judge: Judge, base: PreTrainedModel, prompts: dict[str, list[list[int]]]
) -> dict[str, Any]:
    """The untuned model's own tests; kept beside the checkpoints, so that a resume has them."""
    kept = work.folder / BASE_TESTS
    if work.resume and kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    announce("testing the base model")
    found = judge.tests(base, base, work.data.tests, prompts)
    if rank() == 0:
        write_json(kept, found)
    return found


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Each evaluation's line of the log, the latest of a step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if "eval_loss" in line}
    return list(by_step.values())


def _release_memory() -> None:
    """Give back what generation took: training needs other block sizes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)
