"""The tuning run: modules in, a tuned prefill module and its measurements out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qsun.checkpoint_files import read_config_file
from qsun.decode_checkpoint import weights_digest
from qsun.decode_recipe import QUANTIZATION, decode_recipe
from qsun.errors import ConfigError, Interrupted, ResourceError
from qsun.files import GIB, write_json
from qsun.handoff import Boundary
from qsun.models import load_tokenizer
from qsun.prefill_module import save_prefill
from qsun.processes import count, rank
from qsun.progress import announce
from qsun.tune.batches import Encoded, MicroBatches, padding_share
from qsun.tune.judge import Judge
from qsun.tune.load import device_of_process, load_frozen, trained_modules
from qsun.tune.precision import as_served
from qsun.tune.texts import Texts, encode_task
from qsun.tune.trainer import train
from qsun.tune.work import Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_TESTS = "base-tests.json"
# What torch says where an allocation fails: its own, CUDA's and cuBLAS's.
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def tune(work: Work, out: Path) -> dict[str, Any]:
    """Train, write the prefill module to `out`, and measure it; returns the record's result.

    Raises:
        DataError: no response tokens are left.
        ResourceError: the accelerator's memory ran out.
        Interrupted: the user stopped it; a checkpoint waits in `work.folder`.
    """
    try:
        return _tune(work, out)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        tune = work.run.tune
        raise ResourceError(
            f"memory ran out at tune.micro_batch_size {tune.micro_batch_size}, "
            f"tune.generation_batch_size {tune.generation_batch_size}.\n"
            "Lower them, or set tune.gradient_checkpointing=true or tune.module=lora; then go on "
            "with --resume where a checkpoint was kept."
        ) from error


def _tune(work: Work, out: Path) -> dict[str, Any]:
    settings = work.run.tune
    announce("tokenizing the task's rows")
    tokenizer = load_tokenizer(work.checkpoints.base)
    model_config = read_config_file(work.checkpoints.base / "config.json")
    texts = encode_task(work.task, work.data, tokenizer, model_config["max_position_embeddings"])
    batches = _batches(texts.train, work)
    judge = Judge(
        work.task,
        tokenizer,
        Boundary(settings.boundary),
        settings.micro_batch_size,
        settings.generation_batch_size,
    )
    announce("loading the modules")
    frozen = load_frozen(work)
    tests: dict[str, Any] = {}
    if settings.test and settings.test_base and texts.test_prompts:
        tests["base"] = _base_tests(work, judge, frozen.base, texts)
    prefill, modules = trained_modules(work, frozen)
    reader = prefill if work.system == "full-ft" else frozen.decode

    announce(f"tuning {work.task.name} as {work.system}: {batches.steps} steps")
    _name_idle_gpus()
    _forget_peak()
    evaluation = partial(_evaluate, work, judge, texts, prefill, reader)
    trained = train(work.run, modules, batches, evaluation, work.folder, work.resume)
    if trained is None:
        raise Interrupted(
            f"interrupted; nothing was published. A checkpoint waits in {work.folder}: the same "
            "command with --resume goes on from it."
        )
    trained |= {
        "tokens": sum(map(len, texts.train.rows)) * settings.epochs,
        "padding_share": round(padding_share(texts.train.rows, batches), 4),
        "processes": count(),
        "accelerator_gib": _peak_gib(),
    }
    if rank() == 0:
        save_prefill(prefill, out, getattr(torch, work.dtype), work.run.base.model)
        if settings.module == "full":
            tokenizer.save_pretrained(out)
    announce("measuring what was tuned")
    losses, tuned_tests = _measure(work, judge, texts, prefill, reader, frozen.base)
    return {
        "system": work.system,
        "module": settings.module,
        "boundary": settings.boundary,
        **_decode_identity(work),
        "task": {"name": work.task.name, "checker": work.task.checker, **work.data.summary()},
        "rows": {"train": texts.train.summary(), "validation": texts.validation.summary()},
        "trained_weights": sum(weight.numel() for weight in modules.trained_weights().values()),
        "training": trained,
        "evaluations": _evaluations(work.folder),
        "validation_loss": losses,
        "tests": tests | tuned_tests,
    }


def _decode_identity(work: Work) -> dict[str, str | None]:
    """Which quantized module it was tuned through, and its recipe; None for the base model."""
    decode = work.checkpoints.decode
    if work.system != "qsun" or decode is None:
        return {"decode_digest": None, "decode_recipe": None}
    return {
        "decode_digest": weights_digest(decode),
        "decode_recipe": decode_recipe(decode / QUANTIZATION),
    }


def _evaluate(
    work: Work, judge: Judge, texts: Texts, prefill: PreTrainedModel, reader: PreTrainedModel
) -> dict[str, float]:
    """Loss and, where the validation rows have answers, accuracy, as the module would be served."""
    with as_served(getattr(torch, work.dtype), prefill, reader):
        metrics = {"loss": judge.loss(prefill, reader, texts.validation.rows)}
        answered = all(example.answer for example in work.data.validation)
        if work.task.checker is not None and answered:
            made = judge.responses(prefill, reader, texts.validation_prompts)
            metrics["accuracy"] = judge.accuracy(made, work.data.validation).share
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # training needs other block sizes than generation
    return metrics


def _measure(
    work: Work,
    judge: Judge,
    texts: Texts,
    prefill: PreTrainedModel,
    reader: PreTrainedModel,
    base: PreTrainedModel,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Validation losses and tests of the system, and of the naive hand-off beside full-ft."""
    systems = {work.system: (prefill, reader)}
    if work.system == "full-ft":
        systems["naive"] = (prefill, base)
    tests = {}
    with as_served(getattr(torch, work.dtype), prefill, reader, base):
        losses = {
            name: judge.loss(*modules, texts.validation.rows)
            for name, modules in (systems | {"base": (base, base)}).items()
        }
        if work.run.tune.test:
            for name, modules in systems.items():
                tests[name] = judge.tests(*modules, work.data.tests, texts.test_prompts)
    return losses, tests


def _name_idle_gpus() -> None:
    """Say which GPUs a single process leaves alone, and what puts them to work."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count() == 1 and visible > 1:
        announce(
            f"on one GPU of {visible}, the rest stay idle; a process for each: "
            f"accelerate launch --num_processes {visible} --no_python qsun tune ..."
        )


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(device_of_process())


def _peak_gib() -> float | None:
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated(device_of_process()) / GIB, 2)


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


def _base_tests(work: Work, judge: Judge, base: PreTrainedModel, texts: Texts) -> dict[str, Any]:
    """The untuned model's own tests; kept beside the checkpoints, so that a resume has them."""
    kept = work.folder / BASE_TESTS
    if work.resume and kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    announce("testing the base model")
    found = judge.tests(base, base, work.data.tests, texts.test_prompts)
    if rank() == 0:
        write_json(kept, found)
    return found


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Each evaluation's line of the log, the latest of a step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if "eval_loss" in line}
    return list(by_step.values())
