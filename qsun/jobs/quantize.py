"""The quantize job: from a config file to a checked decode module in a folder of its own.

config -> model config -> plan and estimate -> texts -> base checkpoint -> AWQ -> written layers
-> load check in vLLM -> records -> published folder. Each step refuses before the next begins.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.calibrate.samples import SampleSet, SourceRows, read_sources, tokenize_sources
from qsun.environments import ServingEnvironment
from qsun.errors import ConfigError, Interrupted, LoadCheckError
from qsun.files import digest_folder, publish_folder
from qsun.jobs.evaluation_state import digest_of
from qsun.jobs.prepare import Prepared, check_ready
from qsun.models import (
    checkpoint_folder,
    fingerprint,
    load_model,
    load_tokenizer,
    on_accelerator,
    serving_dtype,
)
from qsun.progress import announce
from qsun.quantize.estimate import Estimate
from qsun.records import new_record, peak_memory_bytes

if TYPE_CHECKING:
    from qsun.jobs.search_state import SearchState
    from qsun.quantize.outcome import Quantization
    from qsun.quantize.plan import Plan


def run_quantize(prepared: Prepared, resume: bool = False) -> dict[str, Any]:
    """Do it all and publish `prepared.out`; returns the result of the quantization record.

    Engine qsun keeps what is finished beside `prepared.out`, and can `resume` there.

    Raises:
        QsunError: nothing was published.
        LoadCheckError: the module is kept beside the output, under a name that says so.
    """
    from qsun.jobs.quantization_report import write_report

    started = time.monotonic()
    if resume and prepared.settings.engine != "qsun":
        raise ConfigError("--resume: engine llmcompressor keeps nothing to go on from")
    serving = check_ready(prepared)
    announce("reading calibration and held-out text")
    sources = read_sources(prepared.calibration, _folder(prepared, "calibration"))
    heldout_sources = read_sources(prepared.heldout, _folder(prepared, "heldout"))
    with publish_folder(prepared.out) as scratch, _scratch_beside(prepared.out) as base_scratch:
        announce("opening the base model")
        dtype = serving_dtype(prepared.model_config)
        base = checkpoint_folder(prepared.source, prepared.shape, base_scratch, dtype)
        texts = _tokenize(prepared, base, sources, heldout_sources)
        state = _open_state(prepared, base, texts.calibration, resume)
        with _resumable(state):
            result = _quantize_and_check(prepared, base, scratch, texts, state, serving)
            result["base"] = {
                "model": prepared.run.base.model,
                "revision": prepared.run.base.revision,
                "sha256": fingerprint(prepared.source, base),
            }
            result["prefill"] = {task: digest_of(one) for task, one in prepared.prefill.items()}
            result["cost"] = _cost(time.monotonic() - started, result, prepared.estimate)
            result["files"] = digest_folder(scratch)
            record = new_record("quantization", prepared.run, prepared.run.seed, result)
            if serving is not None:
                record.versions.update({f"serving/{k}": v for k, v in serving.versions.items()})
            write_report(prepared.run.name, asdict(record), scratch)
            record.write(scratch / "records" / "quantization.json")
    if state is not None:
        state.close()
    return result


@dataclass(frozen=True)
class Texts:
    """Calibration and held-out text, tokenized."""

    calibration: SampleSet
    heldout: SampleSet


def _tokenize(
    prepared: Prepared, base: Path, sources: list[SourceRows], heldout_sources: list[SourceRows]
) -> Texts:
    tokenizer = load_tokenizer(base)
    return Texts(
        tokenize_sources(sources, prepared.calibration, tokenizer),
        tokenize_sources(heldout_sources, prepared.heldout, tokenizer),
    )


def _open_state(
    prepared: Prepared, base: Path, calibration: SampleSet, resume: bool
) -> SearchState | None:
    """Where engine qsun keeps what is finished; None for an engine that keeps nothing."""
    if prepared.settings.engine != "qsun":
        return None
    from qsun.jobs.quantize_blocks import open_state

    return open_state(prepared, base, calibration, resume)


@contextmanager
def _resumable(state: SearchState | None) -> Iterator[None]:
    """Tell who interrupts a search that something of it is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        if state is None or not state.is_started:
            raise
        raise Interrupted(
            f"interrupted; nothing was published. What is finished waits in {state.folder}: "
            "the same command with --resume goes on from it."
        ) from error


def _quantize_and_check(
    prepared: Prepared,
    base: Path,
    out: Path,
    texts: Texts,
    state: SearchState | None,
    serving: ServingEnvironment | None,
) -> dict[str, Any]:
    from qsun.jobs.quantization_report import covered

    _seed(prepared.run.seed)
    calibration, heldout = texts.calibration, texts.heldout
    if state is not None and prepared.plan.target_bits is not None:
        from qsun.jobs.choose_bits import choose_bits

        prepared = choose_bits(prepared, base, calibration, state)
    outcome = _quantize(prepared, base, out, texts, state)
    try:
        load_check = _load_check(prepared, base, out, heldout, serving)
    except LoadCheckError as error:
        kept = _keep_rejected(out, prepared.out)
        raise LoadCheckError(f"{error}\nNot published; kept as {kept}.") from error
    return {
        "plan": _plan(prepared.plan),
        "calibration": calibration.summary() | {"coverage": covered(prepared, calibration)},
        "heldout": heldout.summary(),
        "quantization": outcome.summary(),
        "load_check": load_check,
    }


def _plan(plan: Plan) -> dict[str, Any]:
    """The plan for a record: the layers' own bits stand with each layer's results."""
    found = asdict(replace(plan, layers=(), layer_bits={}))
    del found["layer_bits"]
    return found | {
        "layers": len(plan.layers),
        "mean_bits": plan.code_bits,
        "mean_stored_bits": plan.packed_bits,
        "stored_bits_per_weight": plan.bits_per_weight,
    }


def _quantize(
    prepared: Prepared, base: Path, out: Path, texts: Texts, state: SearchState | None
) -> Quantization:
    if state is not None:
        from qsun.jobs.quantize_blocks import quantize_by_blocks

        return quantize_by_blocks(prepared, base, texts.calibration, texts.heldout, state, out)
    from qsun.quantize.run import quantize

    return quantize(
        base,
        prepared.model_config,
        prepared.plan,
        texts.calibration.tokens,
        texts.heldout.tokens,
        prepared.settings.grid_points,
        out,
    )


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
    path: str = getattr(prepared.settings, which)
    return (prepared.config_dir / path).absolute().parent


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _cost(wall_s: float, result: dict[str, Any], expected: Estimate) -> dict[str, Any]:
    import torch

    return {
        "wall_s": wall_s,
        "search_s": result["quantization"]["search_s"],
        "search_s_estimated": expected.search_s,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_memory_bytes_estimated": expected.memory_bytes,
        "peak_accelerator_bytes": max(
            map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())), default=0
        ),
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
