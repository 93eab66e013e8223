"""Preparing a quantization: what can be known, and refused, before weights are opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.calibrate.definition import TextDefinition, load_definition
from qsun.checkpoint_files import read_config_file
from qsun.config import QuantizeConfig, RunConfig
from qsun.environments import ServingEnvironment, find_serving_environment
from qsun.errors import ConfigError, ModelError, OutputError, PlanError, ResourceError, bullet_list
from qsun.files import free_bytes, refuse_used_folder, size
from qsun.jobs.prepare_search import check_search, memory_limit
from qsun.models import ModelSource, locate, read_config
from qsun.quantize.estimate import Estimate, estimate
from qsun.quantize.estimate_blocks import estimate_blocks
from qsun.quantize.plan import Plan, check_architecture, make_plan
from qsun.scheme import candidate_bits
from qsun.skeleton import Skeleton, skeleton

NEED = "one decoder block and what is summed of its inputs need about"
DISK_MARGIN = 1.05  # tokenizer, records and file system overhead beside the tensors


@dataclass(frozen=True)
class Prepared:
    """Everything known before weights are opened."""

    run: RunConfig
    settings: QuantizeConfig
    config_dir: Path
    source: ModelSource
    model_config: dict[str, Any]
    shape: Skeleton
    plan: Plan
    estimate: Estimate
    calibration: TextDefinition
    heldout: TextDefinition
    prefill: dict[str, Path]
    out: Path


def prepare(run: RunConfig, config_path: Path, out: Path, dry_run: bool) -> Prepared:
    """Plan and estimate; a dry run may use `base.config` in place of a model at hand.

    Raises:
        QsunError: whatever would stop the run later and can be known now.
    """
    relative_to = config_path.absolute().parent
    settings = run.quantize
    if settings is None:
        raise ConfigError(f"{config_path} has no section `quantize`: it says how D is quantized")
    calibration = load_definition(relative_to / settings.calibration)
    heldout = load_definition(relative_to / settings.heldout)
    source, model_config = _model_config(run, relative_to, dry_run)
    check_architecture(model_config)
    shape = skeleton(model_config)
    texts = {settings.calibration: calibration, settings.heldout: heldout}
    _check_lengths(texts, model_config["max_position_embeddings"])
    plan = make_plan(model_config, shape.linears, settings)
    prefill = check_search(settings, plan, calibration, model_config, shape, relative_to)
    expected = _estimate(settings, plan, model_config, shape, calibration, source)
    return Prepared(
        run,
        settings,
        relative_to,
        source,
        model_config,
        shape,
        plan,
        expected,
        calibration,
        heldout,
        prefill,
        out,
    )


def _estimate(
    settings: QuantizeConfig,
    plan: Plan,
    model_config: Mapping[str, Any],
    shape: Skeleton,
    calibration: TextDefinition,
    source: ModelSource,
) -> Estimate:
    texts, converts = (calibration.samples, calibration.max_tokens), source.gguf is not None
    if settings.engine == "qsun":
        limit = memory_limit(settings.search)
        return estimate_blocks(plan, model_config, shape, *texts, settings.search, converts, limit)
    return estimate(plan, model_config, shape, *texts, settings.grid_points, converts)


def _model_config(
    run: RunConfig, relative_to: Path, dry_run: bool
) -> tuple[ModelSource, dict[str, Any]]:
    if dry_run and run.base.config is not None:
        source = ModelSource(hub_id=run.base.model, revision=run.base.revision)
        return source, read_config_file(relative_to / run.base.config)
    source = locate(run.base.model, run.base.revision, relative_to)
    try:
        return source, read_config(source)
    except ModelError as error:
        if run.base.config is None or source.hub_id is None:
            raise
        raise ModelError(f"{error}\n--dry-run plans from {run.base.config} instead.") from error


def _check_lengths(texts: Mapping[str, TextDefinition], context_tokens: int) -> None:
    problems = [
        f"{path}: max_tokens {text.max_tokens} is above the model's max_position_embeddings "
        f"{context_tokens}"
        for path, text in texts.items()
        if text.max_tokens > context_tokens
    ]
    if problems:
        raise ConfigError(
            f"samples would be longer than the model can read:\n{bullet_list(problems)}\n"
            f"Lower max_tokens to {context_tokens} or less."
        )


def warnings_of(prepared: Prepared) -> list[str]:
    """What a user should know before starting, none of it forbidden."""
    import psutil

    found = []
    available = psutil.virtual_memory().available
    if _lacks_memory(prepared):
        found.append(_memory_message(prepared))
    elif prepared.estimate.memory_bytes > available:
        found.append(
            f"about {size(prepared.estimate.memory_bytes)} of memory are expected, "
            f"{size(available)} are free here: the run would probably be killed"
        )
    if prepared.estimate.disk_bytes * DISK_MARGIN > free_bytes(prepared.out):
        found.append(_disk_message(prepared))
    return found


def _lacks_memory(prepared: Prepared) -> bool:
    expected = prepared.estimate
    on_gpu = expected.accelerator_bytes > _free_on_gpu(expected)
    return on_gpu or expected.needed_bytes > memory_limit(prepared.settings.search)


def _free_on_gpu(expected: Estimate) -> int:
    """Bytes free on the fullest GPU, where one is used."""
    if not expected.accelerator_bytes:
        return 0
    import torch

    return min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))


def _memory_message(prepared: Prepared) -> str:
    expected = prepared.estimate
    if expected.accelerator_bytes > _free_on_gpu(expected):
        where = f"a GPU's memory, {size(_free_on_gpu(expected))} are free"
        return f"{NEED} {size(expected.accelerator_bytes)} of {where}"
    source = (
        "free" if prepared.settings.search.memory is None else "given by quantize.search.memory"
    )
    limit = size(memory_limit(prepared.settings.search))
    return f"{NEED} {size(expected.needed_bytes)} of memory, {limit} are {source}"


def _disk_message(prepared: Prepared) -> str:
    return (
        f"about {size(prepared.estimate.disk_bytes * DISK_MARGIN)} of disk are needed at "
        f"{prepared.out.parent}, {size(free_bytes(prepared.out))} are free"
    )


def check_ready(prepared: Prepared) -> ServingEnvironment | None:
    """Everything a real run needs besides a plan; gives the serving environment if one is used.

    Raises:
        OutputError: the output folder is in use, or the disk too small.
        ResourceError: the memory is.
        ServingEnvironmentError: no vLLM for the load check.
        PlanError: vLLM has no kernel for these bits, so that the load check could not pass.
        ConfigError: the load check wants more prompts than there are.
    """
    refuse_used_folder(prepared.out)
    if _lacks_memory(prepared):
        raise ResourceError(
            f"{_memory_message(prepared)}.\nFree some, or say by --memory how much there will be."
        )
    if prepared.estimate.disk_bytes * DISK_MARGIN > free_bytes(prepared.out):
        raise OutputError(f"{_disk_message(prepared)}.\nFree some room or choose another --out.")
    if prepared.run.load_check.mode == "skip":
        return None
    serving = find_serving_environment(prepared.run.load_check.python, prepared.config_dir)
    _check_kernels(prepared, serving)
    if prepared.heldout.samples < prepared.run.load_check.prompts:
        raise ConfigError(
            f"load_check.prompts is {prepared.run.load_check.prompts}, but the held-out text has "
            f"only {prepared.heldout.samples} samples: raise its samples or lower "
            "load_check.prompts"
        )
    return serving


def _check_kernels(prepared: Prepared, serving: ServingEnvironment) -> None:
    settings = prepared.settings
    stored = prepared.plan.scheme.stored_sizes
    if settings.target_bits is not None and settings.stored_bits is None:
        stored = candidate_bits(settings.format, None)
    missing = [bits for bits in stored if bits not in serving.kernel_bits]
    if not missing:
        return
    wanted = prepared.plan.bits if settings.target_bits is None else settings.target_bits
    roomy = [bits for bits in serving.kernel_bits if bits >= wanted]
    remedies = [
        f"To serve the same codes packed in {bits} bits, with {bits}-bit codes' memory: "
        f"--set quantize.stored_bits={bits}"
        for bits in roomy[:1]
    ]
    kind = "CPU" if serving.on_cpu else "GPU"
    raise PlanError(
        f"vLLM's {kind} build has no kernel for {' and '.join(map(str, missing))}-bit weights (it "
        f"has {', '.join(map(str, serving.kernel_bits))}): the load check could not pass.\n"
        + "\n".join([*remedies, "To quantize without it: --set load_check.mode=skip"])
    )
