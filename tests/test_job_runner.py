"""Jobs on GPUs end with all that they started."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.gpu import job_runner
from tests.gpu.job_runner import Job, Limits, run_jobs
from tests.processes import PARENT, ends


def test_what_a_stopped_job_started_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_runner, "STOP_S", 5)
    told, done = tmp_path / "pid", tmp_path / "done"
    command = ["bash", "-c", f"{sys.executable} -c '{PARENT}' {told}; touch {done}"]
    job = Job("slow", tmp_path, lambda: command, done)
    assert not run_jobs([job], Limits(("0",), 1, 1, time.monotonic() + 2))
    assert ends(int(told.read_text()))
    assert not done.exists()
