"""The quantize job: from a config file to a checked decode module in a folder of its own.

config -> model config -> plan and estimate -> texts -> base checkpoint -> AWQ -> written layers
-> load check in vLLM -> records -> published folder. Each step refuses before the next begins.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qsun.calibrate.definition import TextDefinition, load_definition
from qsun.calibrate.samples import SampleSet, SourceRows, read_sources, tokenize_sources
from qsun.config import RunConfig
from qsun.environments import ServingEnvironment, find_serving_environment
from qsun.errors import LoadCheckError, ModelError, OutputError, PlanError
from qsun.files import GIB, digest_folder, free_bytes, publish_folder, refuse_used_folder
from qsun.models import (
    ModelSource,
    checkpoint_folder,
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
    on_accelerator,
    read_config,
    read_config_file,
    serving_dtype,
    skeleton,
)
from qsun.progress import announce
from qsun.quantize.estimate import Estimate, estimate
from qsun.quantize.plan import Plan, check_architecture, make_plan
from qsun.records import new_record

DISK_MARGIN = 1.05  # tokenizer, records and file system overhead beside the tensors


@dataclass(frozen=True)
class Prepared:
    """Everything known before weights are opened."""

    run: RunConfig
    config_dir: Path
    source: ModelSource
    model_config: dict[str, Any]
    plan: Plan
    estimate: Estimate
    calibration: TextDefinition
    heldout: TextDefinition
    out: Path


def prepare(run: RunConfig, config_path: Path, out: Path, dry_run: bool) -> Prepared:
    """Plan and estimate; a dry run may use `base.config` in place of a model at hand.

    Raises:
        QsunError: whatever would stop the run later and can be known now.
    """
    relative_to = config_path.absolute().parent
    settings = run.quantize
    calibration = load_definition(relative_to / settings.calibration)
    heldout = load_definition(relative_to / settings.heldout)
    source, model_config = _model_config(run, relative_to, dry_run)
    check_architecture(model_config)
    shape = skeleton(model_config)
    plan = make_plan(model_config, shape.linears, settings)
    expected = estimate(
        plan,
        model_config,
        shape,
        calibration.samples,
        calibration.max_tokens,
        settings.grid_points,
        converts=source.gguf is not None,
    )
    return Prepared(
        run, relative_to, source, model_config, plan, expected, calibration, heldout, out
    )


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


def warnings_of(prepared: Prepared) -> list[str]:
    """What a user should know before starting, none of it forbidden."""
    import psutil

    found = []
    available = psutil.virtual_memory().available
    if prepared.estimate.memory_bytes > available:
        found.append(
            f"about {prepared.estimate.memory_bytes / GIB:.0f} GiB of memory are expected, "
            f"{available / GIB:.0f} GiB are free here: the run would probably be killed"
        )
    if prepared.estimate.disk_bytes * DISK_MARGIN > free_bytes(prepared.out):
        found.append(_disk_message(prepared))
    return found


def _disk_message(prepared: Prepared) -> str:
    return (
        f"about {prepared.estimate.disk_bytes * DISK_MARGIN / GIB:.2f} GiB of disk are needed at "
        f"{prepared.out.parent}, {free_bytes(prepared.out) / GIB:.2f} GiB are free"
    )


def check_ready(prepared: Prepared) -> ServingEnvironment | None:
    """Everything a real run needs besides a plan; gives the serving environment if one is used.

    Raises:
        OutputError: the output folder is in use, or the disk too small.
        ServingEnvironmentError: no vLLM for the load check.
        PlanError: vLLM has no kernel for these bits, so that the load check could not pass.
    """
    refuse_used_folder(prepared.out)
    if prepared.estimate.disk_bytes * DISK_MARGIN > free_bytes(prepared.out):
        raise OutputError(f"{_disk_message(prepared)}.\nFree some room or choose another --out.")
    if prepared.run.load_check.mode == "skip":
        return None
    serving = find_serving_environment(prepared.run.load_check.python)
    if prepared.plan.bits not in serving.kernel_bits:
        kind = "CPU" if serving.on_cpu else "GPU"
        raise PlanError(
            f"vLLM's {kind} build has no kernel for {prepared.plan.bits}-bit weights (it has "
            f"{', '.join(map(str, serving.kernel_bits))}): the load check could not pass.\n"
            "To quantize without it: --set load_check.mode=skip"
        )
    return serving


def run_quantize(prepared: Prepared) -> dict[str, Any]:
    """Do it all and publish `prepared.out`; returns the result of the quantization record.

    Raises:
        QsunError: nothing was published.
        LoadCheckError: the module is kept beside the output, under a name that says so.
    """
    started = time.monotonic()
    serving = check_ready(prepared)
    announce("reading calibration and held-out text")
    sources = read_sources(prepared.calibration, _folder(prepared, "calibration"))
    heldout_sources = read_sources(prepared.heldout, _folder(prepared, "heldout"))
    with publish_folder(prepared.out) as scratch, _scratch_beside(prepared.out) as base_scratch:
        announce("opening the base model")
        dtype = serving_dtype(prepared.model_config)
        with checkpoint_folder(prepared.source, base_scratch, dtype) as base:
            try:
                result = _quantize_and_check(
                    prepared, base, scratch, sources, heldout_sources, serving
                )
            except LoadCheckError as error:
                kept = _keep_rejected(scratch, prepared.out)
                raise LoadCheckError(f"{error}\nNot published; kept as {kept}.") from error
            result["base"] = {
                "model": prepared.run.base.model,
                "revision": prepared.run.base.revision,
                "sha256": fingerprint(prepared.source, base),
            }
        result["cost"] = _cost(time.monotonic() - started, result, prepared.estimate)
        result["files"] = digest_folder(scratch)
        record = new_record("quantization", prepared.run, prepared.run.seed, result)
        if serving is not None:
            record.versions.update({f"serving/{k}": v for k, v in serving.versions.items()})
        record.write(scratch / "records" / "quantization.json")
    return result


def _quantize_and_check(
    prepared: Prepared,
    base: Path,
    out: Path,
    sources: list[SourceRows],
    heldout_sources: list[SourceRows],
    serving: ServingEnvironment | None,
) -> dict[str, Any]:
    from qsun.quantize.run import quantize

    _seed(prepared.run.seed)
    tokenizer = load_tokenizer(base)
    calibration = tokenize_sources(sources, prepared.calibration, tokenizer)
    heldout = tokenize_sources(heldout_sources, prepared.heldout, tokenizer)
    outcome = quantize(
        base,
        prepared.model_config,
        prepared.plan,
        calibration.tokens,
        heldout.tokens,
        prepared.run.quantize.grid_points,
        out,
    )
    return {
        "plan": asdict(replace(prepared.plan, layers=())) | {"layers": len(prepared.plan.layers)},
        "calibration": calibration.summary(),
        "heldout": heldout.summary(),
        "quantization": outcome.summary(),
        "load_check": _load_check(prepared, base, out, heldout, serving),
    }


def _load_check(
    prepared: Prepared,
    base: Path,
    out: Path,
    heldout: SampleSet,
    serving: ServingEnvironment | None,
) -> dict[str, Any]:
    if serving is None:
        return {"mode": "skip"}
    from qsun.decode_checkpoint import load_dequantized
    from qsun.verify.load_check import check_load, make_reference, require_pass

    settings = prepared.run.load_check
    announce("load check: the quantized module in vLLM")
    model = load_dequantized(out)
    with on_accelerator(model):
        reference = make_reference(model, heldout.tokens, settings)
    check = check_load(out, reference, model, serving, settings, question=settings.question)
    del model
    result: dict[str, Any] = {"mode": settings.mode, "quantized": check.summary()}
    if settings.measure_noise:
        announce("load check: the base model in vLLM, for the noise of the comparison itself")
        full = load_model(base, serving_dtype(prepared.model_config))
        with on_accelerator(full):
            reference = make_reference(full, heldout.tokens, settings)
        noise = check_load(base, reference, full, serving, settings)
        result["full_precision"] = noise.summary()
    require_pass(check, settings)
    return result


def _folder(prepared: Prepared, which: str) -> Path:
    path: str = getattr(prepared.run.quantize, which)
    return (prepared.config_dir / path).absolute().parent


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _cost(wall_s: float, result: dict[str, Any], expected: Estimate) -> dict[str, Any]:
    import torch

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    return {
        "wall_s": wall_s,
        "search_s": result["quantization"]["search_s"],
        "search_s_estimated": expected.search_s,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_memory_bytes_estimated": expected.memory_bytes,
        "peak_accelerator_bytes": torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else 0,
    }


@contextmanager
def _scratch_beside(out: Path) -> Iterator[Path]:
    """Room for a converted base model on the output's own disk, gone when the run ends."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.base-", dir=out.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _keep_rejected(scratch: Path, out: Path) -> Path:
    kept = Path(tempfile.mkdtemp(prefix=f"{out.name}.rejected-", dir=out.parent))
    for path in scratch.iterdir():
        path.rename(kept / path.name)
    return kept
