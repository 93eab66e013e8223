"""A bundle of SmolLM2 with two tasks and a quantized decoder, served once for these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from qsun.bundle import Bundle, read_bundle
from qsun.verify.served.in_process import InProcess
from tests.bundles import write_decode, write_passed_verdict
from tests.command import run_qsun
from tests.serving import Serving, serving

ROOT = Path(__file__).parent.parent.parent
REFERENCE = ROOT / "exports" / "reference"
TASKS = ("math", "tools")
# Eight steps of a bfloat16 logit: where two tokens are that close, either computation may choose.
TIE_NATS = 1.0


@pytest.fixture(scope="package")
def bundle(smollm2_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Exported as a user does."""
    folder = tmp_path_factory.mktemp("served")
    write_decode(smollm2_base, folder / "decode", "compressed-tensors")
    return exported(smollm2_base, folder / "decode", folder)


def exported(base: Path, decode: Path, folder: Path) -> Bundle:
    """A bundle of both tasks on this decode module, with a verdict."""
    config = {
        "name": "served",
        "base": {"model": str(base)},
        "tasks": [str(ROOT / "calib" / "tasks" / f"{task}.yaml") for task in TASKS],
        "export": {
            "decode": str(decode),
            "prefill": [{"task": task, "module": str(REFERENCE / task)} for task in TASKS],
            "references": 4,
            "max_tokens": 768,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    outcome = run_qsun("export", folder / "run.yaml", "--out", folder / "bundle")
    assert outcome.exit_code == 0, outcome.stderr
    write_passed_verdict(folder / "bundle")
    return read_bundle(folder / "bundle")


@pytest.fixture(scope="package")
def in_process(bundle: Bundle) -> InProcess:
    """The same modules in this process."""
    return InProcess(bundle)


@pytest.fixture(scope="package")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`qsun serve` with two decode workers; it must end cleanly, and leave nobody behind."""
    with serving(tmp_path_factory.mktemp("serving"), bundle.folder, "--decode", "2") as running:
        # A task is served once one decode worker is ready; tests ask either by name.
        running.until(dict.fromkeys(running.workers(), "ready"))
        processes = [one for name in running.workers() for one in running.processes(name)]
        assert len(processes) >= 3
        yield running
        assert running.stop() == 0
        assert [one for one in processes if is_alive(one)] == []


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and was not asked how by its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
