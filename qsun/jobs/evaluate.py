"""The evaluate job: every system on every test set, sample by sample, to one scorecard.

request -> systems and test sets, checked -> test sets opened -> one pair of modules after another;
what is finished is kept in a folder of its own for a resume -> scorecard, written last.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsun.bundle import LATER_RECORDS
from qsun.errors import DataError, Interrupted, OutputError
from qsun.evaluate.systems import System
from qsun.evaluate.test_sets import TestSet
from qsun.files import write_json
from qsun.handoff import Boundary
from qsun.jobs.base_model import fetch_base
from qsun.jobs.evaluation_request import router_address
from qsun.jobs.evaluation_state import (
    IDENTITY,
    identity_of,
    open_state,
    samples_path,
    state_folder,
)
from qsun.jobs.prepare_evaluate import PreparedEvaluation, with_base
from qsun.models import ModelSource, checkpoint_folder, load_tokenizer, read_config
from qsun.models import serving_dtype as dtype_of
from qsun.progress import announce
from qsun.records import Record, new_record
from qsun.skeleton import skeleton

SCORECARD = "records/scorecard.json"
SAMPLES = "records/scorecard"
IDLE = "{system}, task {task}: the prefill module writes the cache that an untuned one would: P = D"

assert SCORECARD in LATER_RECORDS


def run_evaluation(prepared: PreparedEvaluation) -> Record:
    """Evaluate what was prepared, and write the scorecard; gives its record.

    Raises:
        QsunError: no scorecard was written; what is finished waits for a resume.
    """
    out = prepared.request.out.resolve()  # `.` has no name to put the kept samples beside
    kept = state_folder(out)
    with tempfile.TemporaryDirectory() as scratch:
        announce("opening the base model")
        base = _open_base(prepared, Path(scratch))
        opened = with_base(prepared, base)
        asking = _open_test_sets(opened, _tokenizer(opened, base))
        open_state(kept, identity_of(opened, base), prepared.request.resume)
        try:
            result = _evaluate(opened, base, kept, asking)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted; no scorecard was written. What is finished waits in {kept}: the "
                "same command with --resume goes on from it."
            ) from error
    record = new_record("scorecard", _config(prepared), prepared.request.settings.seed, result)
    _publish(record, kept, out)
    return record


def _config(prepared: PreparedEvaluation) -> Any:
    return prepared.request.run or prepared.request.settings


def _open_base(prepared: PreparedEvaluation, scratch: Path) -> Path:
    named = prepared.subject.base
    if isinstance(named, Path):
        return named
    if isinstance(named, ModelSource):
        config = read_config(named)
        return checkpoint_folder(named, skeleton(config), scratch, dtype_of(config))
    return fetch_base(named, scratch)


def _tokenizer(prepared: PreparedEvaluation, base: Path) -> Path:
    bundle = prepared.subject.bundle
    return base if bundle is None else bundle.tokenizer


def _open_test_sets(prepared: PreparedEvaluation, tokenizer: Path) -> Any:
    from qsun.evaluate.routed import GENERATION_ONLY
    from qsun.evaluate.run import load_test_sets

    announce("opening the test sets")
    request = prepared.request
    found = load_test_sets(prepared.tests, tokenizer, request.limit, request.settings.unsafe_code)
    scored = [name for name, task in found.tasks.items() if task.OUTPUT_TYPE != "generate_until"]
    if scored and request.served is not None:
        raise DataError(f"{', '.join(scored)}: {GENERATION_ONLY}")
    return found


def _evaluate(prepared: PreparedEvaluation, base: Path, kept: Path, asking: Any) -> dict[str, Any]:
    from qsun.evaluate.load import Loader
    from qsun.evaluate.samples import read_samples
    from qsun.evaluate.scorecard import Scorecard, compare_records

    request, subject = prepared.request, prepared.subject
    loader = Loader(
        base=base,
        tokenizer=load_tokenizer(_tokenizer(prepared, base)),
        boundary=Boundary(subject.boundary),
        max_tokens=subject.max_tokens,
        dtype=dtype_of(json.loads((base / "config.json").read_text(encoding="utf-8"))),
    )
    work = [
        (task, system, one)
        for task, systems in prepared.systems.items()
        for system in systems
        for one in prepared.tests
        if one.task == task
    ]
    warnings = _run_all(prepared, work, loader, asking, kept)
    found = tuple(read_samples(samples_path(kept, system, one)) for _, system, one in work)
    result = Scorecard(found, request.settings.seed).summary()
    result |= {
        "bundle": None if subject.bundle is None else subject.bundle.digest,
        "limit": request.limit,
        "served": request.served is not None,
        "boundary": subject.boundary,
        "warnings": warnings,
        "floors": [asdict(one) for one in prepared.floors],
        "modules": json.loads((kept / IDENTITY).read_text(encoding="utf-8"))["modules"],
        "tpot": _tpot(prepared, base),
    }
    if prepared.before is not None:
        result["compared"] = compare_records(result, prepared.before.result)
    return result


def _run_all(
    prepared: PreparedEvaluation,
    work: list[tuple[str, System, TestSet]],
    loader: Any,
    asking: Any,
    kept: Path,
) -> list[str]:
    """Make the samples that are not there yet; what there is to say of the modules."""
    from qsun.evaluate.run import ask
    from qsun.evaluate.samples import write_samples

    notes = kept / "warnings.json"
    warnings: list[str] = json.loads(notes.read_text()) if notes.exists() else []
    left = [one for one in work if not samples_path(kept, one[1], one[2]).exists()]
    lm, loaded, spent = None, None, 0.0
    for number, (task, system, test_set) in enumerate(left):
        ahead = f", {spent / number * (len(left) - number) / 60:.0f} min left" if number else ""
        announce(f"evaluate: {system.name} on {test_set.name} ({number + 1} of {len(left)}{ahead})")
        began = time.monotonic()
        if loaded != (task, system):
            lm, loaded = None, (task, system)  # frees what the next system does not share
            lm, idle = _model(prepared, task, system, loader)
            said = IDLE.format(system=system.name, task=task)
            if idle and said not in warnings:
                warnings.append(said)
                write_json(notes, warnings)
                announce(f"WARNING: {said}")
        write_samples(ask(asking, test_set, system.name, lm), samples_path(kept, system, test_set))
        spent += time.monotonic() - began
    return warnings


def _model(
    prepared: PreparedEvaluation, task: str, system: System, loader: Any
) -> tuple[Any, bool]:
    """A system as lm-eval's model, and whether its prefill module does nothing unasked."""
    from qsun.evaluate.lm import TwoModules
    from qsun.evaluate.pair import prefill_is_idle
    from qsun.evaluate.routed import RoutedModules

    request, bundle = prepared.request, prepared.subject.bundle
    if request.served is not None and bundle is not None:
        address = router_address(request)
        seed = request.settings.seed
        return RoutedModules(str(bundle.folder), task, address.url, address.key, seed), False
    pair = loader.pair(system)
    lm = TwoModules(pair, request.settings.batch_size, request.settings.seed)
    return lm, not system.one_model and prefill_is_idle(pair)


def _tpot(prepared: PreparedEvaluation, base: Path) -> dict[str, Any] | None:
    settings = prepared.request.settings
    if settings.tpot == "skip" or prepared.subject.decode is None or prepared.request.served:
        return None
    from qsun.environments import find_serving_environment
    from qsun.evaluate.tpot import measure_tpot

    announce("measuring TPOT of the decode module in vLLM")
    serving = find_serving_environment(None)
    return measure_tpot(prepared.subject.decode, base, serving, settings)


def _publish(record: Record, kept: Path, out: Path) -> None:
    """Samples first, the scorecard last; then what a resume would have needed goes."""
    try:
        folder = out / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.jsonl.gz"):
            old.unlink()
        for path in kept.glob("*.jsonl.gz"):
            shutil.copy(path, folder / path.name)
        record.write(out / SCORECARD)
    except OSError as error:
        raise OutputError(
            f"cannot write the scorecard to {out}: {error.strerror}. The samples wait in {kept}: "
            "make room and go on by --resume."
        ) from error
    shutil.rmtree(kept)
