"""Make `docs/records/peers-*.json` and the 8B runs on GPUs, job by job.

    python -m tests.gpu.compare_peers STATE [--minutes 9] [--gpus 0,1] [--samples 128]
        [--iterations 200] [--only PATTERNS] [--making-gib 30] [--dry-run]

`tests.compare_peers` makes and judges every quantizer on SmolLM2 and, once it is pretrained and its
prefill modules are tuned, on the small Qwen3 of `compare_bits`; both engines quantize Llama 3.1
8B's shape. Whatever is timed has a GPU to itself, judging shares one; with less for `--making-gib`
quantizers share one too, and their seconds are longer for it. A call runs what fits in `--minutes`
and can be made again; it sums up what is finished. `make peers` first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.gpu.compare_bits import chosen, start
from tests.gpu.job_runner import ROOT, Job, Limits, run_jobs
from tests.peers.request import COST
from tests.peers.subjects import SUBJECTS

BITS = (4, 3, 2)
WHOLE_GPU, JUDGING = 128, 20  # GiB
LEAST_S = {"make": 60, "judge": 30, "8b": 240}
MODULES = ("math-sun-seed1", "tools-sun-seed1")
SHAPE = "tests/gpu/quantize_8b_shape.sh"
ENGINES = {
    "qsun": ("--set", "quantize.search.positions=all"),
    "llmcompressor": ("--set", "quantize.grid_points=20"),
}


@dataclass(frozen=True)
class Model:
    """One base model's comparison: its folder in the state, and what names it to the script."""

    name: str
    state: Path
    given: tuple[str, ...]
    needs: tuple[str, ...]
    samples: int
    iterations: int
    gib: int

    def jobs(self) -> Iterator[Job]:
        """Texts and base model first; then each quantizer at each number of bits; then judging."""
        first = f"{self.name}-first"
        folder = self._made("round-to-nearest", 4)
        yield self._job(first, 0, self._making("round-to-nearest", 4), folder / COST, self.needs)
        for bits in BITS:
            for subject in SUBJECTS:
                name = f"{self.name}-{subject}-w{bits}"
                cost = self._made(subject, bits) / COST
                making = self._making(subject, bits)
                yield self._job(name, 2, making, cost, (first,), LEAST_S["make"])
                record = self._judged(subject, bits)
                command = self.command(record, str(bits), subject)
                judging = self._job(f"{name}-judged", 3, command, record, (name,), LEAST_S["judge"])
                yield replace(judging, gib=JUDGING)

    def command(self, record: Path, bits: str, subjects: str, *more: str) -> list[str]:
        """The comparison's command line."""
        counts = ["--samples", str(self.samples), "--iterations", str(self.iterations)]
        asked = [*counts, "--bits", bits, "--subjects", subjects, *self.given, *more]
        return [sys.executable, "-m", "tests.compare_peers", str(record), str(self.folder), *asked]

    @property
    def folder(self) -> Path:
        """Where `tests.compare_peers` keeps what is done."""
        return self.state / "peers" / self.name

    def judged_subjects(self) -> list[str]:
        """Who is judged at all numbers of bits."""
        return [
            subject
            for subject in SUBJECTS
            if all(self._judged(subject, bits).exists() for bits in BITS)
        ]

    def _making(self, subject: str, bits: int) -> list[str]:
        return self.command(self.state / "none.json", str(bits), subject, "--only-make")

    def _made(self, subject: str, bits: int) -> Path:
        return self.folder / "made" / f"{subject}-w{bits}-{self.samples}"

    def _judged(self, subject: str, bits: int) -> Path:
        return self.state / "judged" / f"{self.name}-{subject}-w{bits}.json"

    def _job(
        self,
        name: str,
        order: int,
        command: list[str],
        done: Path,
        needs: tuple[str, ...],
        least_s: int = 0,
    ) -> Job:
        return Job(
            name, self.state, lambda: command, done, needs, order, gib=self.gib, least_s=least_s
        )


def shape_jobs(state: Path) -> Iterator[Job]:
    """Both engines on the 8B shape."""
    for engine, options in ENGINES.items():
        record = state / f"8b-{engine}.json"
        script = f"cd {ROOT} && PYTHON={sys.executable} bash {SHAPE} "
        command = ["bash", "-c", script + " ".join([str(record), "--engine", engine, *options])]
        yield Job(
            f"8b-{engine}",
            state,
            partial(list, command),
            record,
            order=1,
            gib=WHOLE_GPU,
            least_s=LEAST_S["8b"],
        )


def main() -> None:
    """Work through the jobs for a while."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("state", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--gpus", default="0", help="numbers, with commas")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round, a block")
    parser.add_argument("--making-gib", type=int, default=WHOLE_GPU, help="of each quantizer")
    parser.add_argument("--only", default="", help="jobs whose name has one of these in it")
    parser.add_argument("--dry-run", action="store_true", help="print every job and its needs")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    state = asked.state.resolve()
    state.mkdir(parents=True, exist_ok=True)
    plan = start(state / "bits", "qwen3", False)
    runs = plan.folder / "runs"
    prefill = [f"--prefill={name.partition('-')[0]}={runs / name}" for name in MODULES]
    given = (f"--base={plan.folder / 'base'}", *prefill)
    needs = tuple(f"qwen3/{name}" for name in MODULES)
    models = [
        Model("smollm2", state, (), (), asked.samples, asked.iterations, asked.making_gib),
        Model("qwen3", state, given, needs, asked.samples, asked.iterations, asked.making_gib),
    ]
    tuning = chosen(plan.jobs(), ",".join(MODULES))
    # The long training comes first: quantizers that are ready earlier would leave it no room.
    tuning = [
        replace(job, gib=max(job.gib, asked.making_gib), reserved=True) if job.gib else job
        for job in tuning
    ]
    jobs = [*tuning, *shape_jobs(state), *(job for model in models for job in model.jobs())]
    jobs = [job for job in jobs if any(part in job.name for part in asked.only.split(","))]
    if asked.dry_run:
        for job in sorted(jobs, key=lambda one: one.order):
            print(f"{job.order} {job.name}: {'done' if job.done.exists() else job.needs}")
        return
    run_jobs(jobs, Limits(tuple(asked.gpus.split(",")), 8, WHOLE_GPU, end))
    for model in models:
        subjects = model.judged_subjects()
        if subjects:
            record = state / f"peers-{model.name}.json"
            bits = ",".join(map(str, BITS))
            command = model.command(record, bits, ",".join(subjects))
            # A record tells its command: as seen from the repository.
            subprocess.run([word.replace(f"{ROOT}/", "") for word in command], check=True, cwd=ROOT)
    print(f"{sum(job.done.exists() for job in jobs)} of {len(jobs)} jobs are done")


if __name__ == "__main__":
    main()
