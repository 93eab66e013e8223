"""Kill a search of engine qsun at random moments, resume it each time, and compare what comes out.

    python -m tests.kill_and_resume RECORD [--kills 20] [--base FOLDER]

SmolLM2-135M is quantized once undisturbed; moments are drawn from the time that this took. Then it
is quantized again, ended by SIGKILL at each of them, and resumed. Every file must come out equal.
`--base` names the converted base model as a file in `configs/` would, else each run converts it.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qsun.files import digest_folder
from qsun.progress import announce
from qsun.records import new_record

ROOT = Path(__file__).parent.parent
QSUN = (sys.executable, "-c", "from qsun.cli.main import main; main()")
SEARCHING = "searching, over"
LOOK_S = 0.005


@dataclass(frozen=True)
class Settings:
    """What is quantized, and how often it is killed; streams are kept after every block."""

    config: str = "configs/smollm2-135m-w4.yaml"
    options: tuple[str, ...] = (
        *("--engine", "qsun", "--set", "load_check.mode=skip"),
        *("--set", "quantize.search.keep_every_s=0"),
    )
    kills: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Timeline:
    """An undisturbed run, in seconds from its start: the search, each block kept, the end."""

    searching_s: float
    kept_s: tuple[float, ...]
    end_s: float

    def place(self, moment_s: float) -> tuple[int | None, float]:
        """A moment as seconds after a block, -1 for none, was kept; None before the search."""
        if moment_s < self.searching_s:
            return None, moment_s
        block = sum(kept_s <= moment_s for kept_s in self.kept_s) - 1
        return block, moment_s - (self.kept_s[block] if block >= 0 else self.searching_s)


class Run:
    """One process that quantizes into `out`, watched through its messages and its state."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self._state = out.with_name(f"{out.name}.quantization")
        self.resumes = (self._state / "run.json").exists()
        # What is numbered lower is not made again.
        self.begins_at = max(map(_number, self._state.glob("streams-*")), default=0)
        self._began, self._began_ns = time.monotonic(), time.time_ns()
        self.searching_s: float | None = None
        resume = ["--resume"] if self.resumes else []
        command = [*QSUN, "quantize", settings.config, "--out", str(out), *settings.options]
        self.process = subprocess.Popen(
            [*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
        )
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line.decode(errors="replace"))
            if SEARCHING in self._said[-1]:
                self.searching_s = self.spent_s

    @property
    def spent_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def is_behind(self, block: int | None) -> bool:
        """Whether this process stands behind a block, as `Timeline.place` has it."""
        if block is None or self.searching_s is None:
            return block is None
        if block < self.begins_at:
            return True
        kept = self._state / f"block-{block:05d}.safetensors"
        return kept.exists() and kept.stat().st_mtime_ns > self._began_ns

    def kill(self, block: int | None, delay_s: float) -> bool:
        """Kill it so long after it stands behind a block; whether it still ran."""
        while self.process.poll() is None and not self.is_behind(block):
            time.sleep(LOOK_S)
        time.sleep(delay_s)
        self.process.kill()
        killed = self.process.wait() < 0
        self._reader.join()
        if not killed:
            self._require_success()
        return killed

    def finish(self) -> tuple[float, ...]:
        """Let it end well; gives when each block was kept."""
        kept_s: list[float] = []
        while self.process.poll() is None:
            if self.is_behind(len(kept_s)) and self.searching_s is not None:
                kept_s.append(self.spent_s)
            time.sleep(LOOK_S)
        self._reader.join()
        self._require_success()
        return tuple(kept_s)

    def _require_success(self) -> None:
        if self.process.returncode:
            raise SystemExit(f"qsun ended with {self.process.returncode}:\n{''.join(self._said)}")


def main() -> None:
    """Quantize undisturbed, quantize killed and resumed, compare, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, metavar="RECORD")
    parser.add_argument("--kills", type=int, default=Settings.kills)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--base", help="a converted base model, as seen from configs/")
    arguments = parser.parse_args()
    settings = Settings(kills=arguments.kills, seed=arguments.seed)
    if arguments.base is not None:
        base = ("--set", f"base.model={arguments.base}")
        settings = replace(settings, options=(*settings.options, *base))
    with tempfile.TemporaryDirectory() as scratch:
        result = measured(settings, Path(scratch))
    new_record("kill-and-resume", settings, settings.seed, result).write(arguments.record)
    kills = len(result["kills"])
    print(f"{kills} kills: {result['files_equal']} of {len(result['files'])} files are equal")
    sys.exit(0 if result["equal"] else 1)


def measured(settings: Settings, folder: Path) -> dict[str, Any]:
    """Both modules' digests, and what was killed when."""
    announce("undisturbed")
    timeline = undisturbed(settings, folder / "undisturbed")
    rng = random.Random(settings.seed)
    moments = sorted(rng.uniform(0, timeline.end_s) for _ in range(settings.kills))
    began = time.monotonic()
    kills = killed(settings, timeline, moments, folder / "killed")
    one, other = (digests(folder / name) for name in ("undisturbed", "killed"))
    return {
        "undisturbed": asdict(timeline),
        "killed_and_resumed_s": time.monotonic() - began,
        "kills": kills,
        "files": one,
        "files_equal": sum(other.get(name) == digest for name, digest in one.items()),
        "equal": one == other,
        "state_left": (folder / "killed.quantization").exists(),
    }


def undisturbed(settings: Settings, out: Path) -> Timeline:
    """Quantize without a kill."""
    run = Run(settings, out)
    kept_s = run.finish()
    assert run.searching_s is not None, "it has searched"
    return Timeline(run.searching_s, kept_s, run.spent_s)


def killed(
    settings: Settings, timeline: Timeline, moments: Sequence[float], out: Path
) -> list[dict[str, Any]]:
    """Quantize with a kill at each moment; the last run ends well, or before its kill."""
    done: list[dict[str, Any]] = []
    for number, moment_s in enumerate(moments, start=1):
        run = Run(settings, out)
        block, delay_s = timeline.place(moment_s)
        if not run.kill(block, delay_s):
            announce(f"kill {number} came too late")
            return done
        announce(f"kill {number}, {delay_s:.2f} s behind block {block}, {run.spent_s:.1f} s spent")
        assert not out.exists(), "nothing half-written is published"
        done.append(
            {
                "moment_s": moment_s,
                "behind_block": block,
                "delay_s": delay_s,
                "spent_s": run.spent_s,
                "resumed": run.resumes,
                "began_at_block": run.begins_at,
            }
        )
        for left in out.parent.glob(f".{out.name}.*"):
            shutil.rmtree(left)  # scratch folders, which nothing can remove behind a SIGKILL
    announce("to the end")
    Run(settings, out).finish()
    return done


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a module, its record left out."""
    files = digest_folder(out)
    return {name: digest for name, digest in files.items() if not name.startswith("records/")}


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


if __name__ == "__main__":
    main()
