"""Outputs in use, disks that fill up, a serving environment that is missing, and interruptions."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.builders import tiny_model, write_config, write_definition
from tests.command import refused, run_qsun
from tests.searching import write_search

REPOSITORY = Path(__file__).parent.parent
QSUN = [sys.executable, "-c", "from qsun.cli.main import main; main()"]
PAGE = 4096  # bytes; a file on tmpfs takes whole pages


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_use(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def a_file(path: Path) -> None:
    path.write_text("years of work")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("make", [in_use, a_file, a_dangling_link])
def test_an_output_in_use_is_left_alone(
    tmp_path: Path, tiny_folder: Path, make: Callable[[Path], None]
) -> None:
    config = write_config(tmp_path / "run", tiny_folder)
    out = tmp_path / "outs" / "module"
    out.parent.mkdir()
    make(out)
    before = sorted(out.parent.rglob("*"))
    outcome = run_qsun("quantize", config, "--out", out)
    assert outcome.exit_code == 7
    assert f"output {out} already exists and is not an empty folder" in outcome.message
    assert "qsun never overwrites" in outcome.message
    assert "reading calibration" not in outcome.stderr  # refused before any work
    assert sorted(out.parent.rglob("*")) == before


def test_an_output_below_a_file(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    config = write_config(tmp_path / "run", tiny_folder)
    outcome = run_qsun("quantize", config, "--out", tmp_path / "file" / "module")
    assert outcome.exit_code == 7
    assert f"cannot write beside {tmp_path / 'file' / 'module'}" in outcome.message


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mount point; `mount_tmpfs` puts a small disk there."""
    point = tmp_path / "disk"
    point.mkdir()
    yield point
    if point.is_mount():
        subprocess.run(["umount", point], check=True)


def run_on_small_disk(
    disk: Path, size: int, config: Path, files: int = 0
) -> tuple[int, str, list[str]]:
    """Quantize to a disk of `size` bytes: exit code, stderr, and what is left on the disk.

    It has room for so many `files`, 0 for any. Who may not mount does it in a name space of its
    own, where one may.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={files}", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        outcome = run_qsun("quantize", config, "--out", disk / "module")
        return outcome.exit_code, outcome.stderr, names(disk)
    command = shlex.join([*QSUN, "quantize", str(config), "--out", str(disk / "module")])
    script = f"{shlex.join(mount)} && {command} >&2; code=$?; ls -A {disk}; exit $code"
    answer = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    return answer.returncode, answer.stderr, answer.stdout.split()


def test_a_disk_too_small_is_refused_before_the_work(
    tmp_path: Path, tiny_folder: Path, disk: Path
) -> None:
    config = write_config(tmp_path / "run", tiny_folder)
    code, stderr, left = run_on_small_disk(disk, 25 * PAGE, config)
    assert code == 7, stderr
    assert f"KiB of disk are needed at {disk}, 100.00 KiB are free" in stderr
    assert "Free some room or choose another --out" in stderr
    assert "opening the base model" not in stderr
    assert left == []


def assert_filled_up(outcome: tuple[int, str, list[str]], disk: Path) -> None:
    code, stderr, left = outcome
    assert code == 7, stderr
    assert f"the disk of {disk} filled up: nothing was published" in stderr
    assert "Traceback" not in stderr
    assert left == []


@pytest.mark.parametrize("missing_pages", [1, 5], ids=["records", "tokenizer"])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, tiny_folder: Path, tiny_module: Path, disk: Path, missing_pages: int
) -> None:
    config = write_config(tmp_path / "run", tiny_folder)
    needed = sum(
        -(-path.stat().st_size // PAGE) for path in tiny_module.rglob("*") if path.is_file()
    )
    assert_filled_up(run_on_small_disk(disk, (needed - missing_pages) * PAGE, config), disk)


def test_a_disk_that_fills_up_under_the_weights(tmp_path: Path, disk: Path) -> None:
    # So many small layers that their names take more room than the estimate's margin.
    tiny_model(tmp_path / "model", hidden=64, intermediate=64, layers=6, vocabulary=320)
    config = write_config(tmp_path / "run", tmp_path / "model")
    plan = json.loads(run_qsun("quantize", config, "--dry-run", "--json").stdout)
    estimated = int(plan["estimate"]["disk_bytes"] * 1.05)
    assert_filled_up(run_on_small_disk(disk, estimated + PAGE, config), disk)


@pytest.mark.parametrize(("files", "keep_every_s"), [(20, 0.0), (11, 3600.0)])
def test_a_disk_that_fills_up_keeps_what_a_search_has_finished(
    tmp_path: Path, disk: Path, files: int, keep_every_s: float
) -> None:
    """It fills up under the streams, a file for each sample, then under the weights."""
    config = write_search(tmp_path, prefill=[], keep_every_s=keep_every_s, batch_tokens=1)
    texts = config.parent / "calibration.yaml"
    texts.write_text(texts.read_text().replace("samples: 4", "samples: 12"))
    plan = json.loads(run_qsun("quantize", config, "--dry-run", "--json").stdout)
    size = 2 * plan["estimate"]["disk_bytes"]
    code, stderr, left = run_on_small_disk(disk, size, config, files)
    assert code == 7, stderr
    assert f"the disk of {disk} filled up: nothing was published" in stderr
    assert "Traceback" not in stderr
    assert left == ["module.quantization"]


def test_the_streams_that_a_search_keeps_are_reckoned_with(tmp_path: Path, disk: Path) -> None:
    config = write_search(tmp_path, prefill=[], keep_every_s=0)
    texts = config.parent / "calibration.yaml"
    texts.write_text(texts.read_text().replace("samples: 4", "samples: 12"))
    plan = json.loads(run_qsun("quantize", config, "--dry-run", "--json").stdout)
    size = int(plan["estimate"]["disk_bytes"] * 1.05) + PAGE
    code, stderr, left = run_on_small_disk(disk, size, config)
    assert code == 0, stderr
    assert left == ["module"]


def test_a_missing_serving_interpreter_names_the_remedy(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(
        tmp_path, tiny_folder, load_check__mode="required", load_check__python="/nowhere/python"
    )
    message = refused(config, 8)
    assert "/nowhere/python: No such file or directory\n" in message
    assert "`make setup` makes one" in message
    assert "QSUN_SERVING_PYTHON" in message
    assert "--set load_check.mode=skip" in message


def test_the_serving_interpreter_of_the_environment_variable(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSUN_SERVING_PYTHON", "/elsewhere/python")
    config = write_config(tmp_path, tiny_folder, load_check__mode="required")
    assert "/elsewhere/python" in refused(config, 8)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec false", "does not run: exit code 1, it said nothing"),
        ("echo broken >&2; exit 3", "does not run: exit code 3, broken\n"),
        ("echo Welcome", "does not run as a Python interpreter: "),
        ("echo 1", "does not run as a Python interpreter: "),
        (f'exec {sys.executable} "$@"', "has no vLLM installed"),
    ],
)
def test_a_serving_interpreter_of_no_use(
    tmp_path: Path, tiny_folder: Path, script: str, reason: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    # Relative, as every path of a config, to the config's own folder.
    config = write_config(
        tmp_path, tiny_folder, load_check__mode="required", load_check__python="./python"
    )
    message = refused(config, 8)
    assert f"{python} {reason}" in message
    assert "`make setup` makes one" in message


def test_a_bare_name_is_an_interpreter_of_the_path(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    config = write_config(
        tmp_path, tiny_folder, load_check__mode="required", load_check__python="python"
    )
    assert "python has no vLLM installed" in refused(config, 8)


def test_more_load_check_prompts_than_there_are(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_config(tmp_path, tiny_folder, load_check={"prompts": 5})
    message = refused(config, 3)
    assert "load_check.prompts is 5, but the held-out text has only 4 samples" in message


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    signals = {signal.SIGINT: tmp_path / "ctrl-c", signal.SIGTERM: tmp_path / "terminated"}
    running = {number: start_long_run(folder, tiny_folder) for number, folder in signals.items()}
    for number, process in running.items():
        assert process.stderr is not None
        for line in process.stderr:
            if "AWQ over" in line:
                break
        before = names(signals[number] / "out")
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert len(before) == 2  # both scratch folders were there
        assert process.returncode == 130, stderr
        assert "qsun: interrupted; nothing was published" in stderr
        assert "Traceback" not in stderr
        assert stdout == ""
        assert names(signals[number] / "out") == []


def start_long_run(folder: Path, model: Path) -> subprocess.Popen[str]:
    config = write_config(folder, model, quantize__grid_points=100)
    source = {"name": "sums", "kind": "jsonl", "path": "calibration.jsonl", "prompt": "prompt"}
    write_definition(folder / "calibration.yaml", source, samples=32)
    (folder / "out").mkdir()
    return subprocess.Popen(
        [*QSUN, "quantize", config, "--out", folder / "out" / "module"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        # A test suite run in the background passes on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
