"""Compare base, full-ft, naive and SUN (full and LoRA prefill modules) on every task.

    python -m tests.gpu.compare_systems CONFIG STATE [--minutes 9] [--gpus 0] [--jobs 5]

Each system's learning rate is chosen among three or four with one seed, on validation rows: by the
share of right answers where it was taken, else by the loss after a part of the budget. Three other
seeds train with the whole of it. Several trainings share a GPU. A call starts what fits in
`--minutes` and can be made again: runs with a record in STATE/records are done, interrupted ones go
on from their checkpoint; `--minutes 0` only sums up. STATE/comparison.json is the record, and
STATE/modules holds the modules of the first seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qsun.config import load_config
from qsun.records import new_record, read_record

CHOOSING_SEED = 0
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Group:
    """One way to train: the learning rates to choose from, or the only one, with one seed."""

    system: str
    module: str
    rates: tuple[float, ...]
    rank: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the group fixes for `qsun tune`."""
        lora = {"tune.lora.rank": self.rank, "tune.lora.alpha": 2 * self.rank}
        module = {"tune.module": self.module, **(lora if self.module == "lora" else {})}
        return module | self.options


GROUPS = {
    "full-ft": Group("full-ft", "full", (1e-4, 2e-4, 5e-4)),
    "sun": Group("sun", "full", (5e-4, 1e-3, 2e-3)),
    "sun-lora": Group("sun", "lora", (1e-3, 2e-3, 4e-3), rank=64),
    "sun-lora-r8": Group("sun", "lora", (2e-3,)),
    "full-ft-lora-r8": Group("full-ft", "lora", (1e-3,)),
    "sun-boundary-n": Group("sun", "full", (1e-3,), options={"tune.boundary": "n"}),
    "sun-mix": Group("sun", "full", (1e-3,), options={"tune.loss": "mix"}, teacher="full-ft"),
}
QSUN = "import sys; sys.argv[0] = 'qsun'; from qsun.cli.main import main; main()"
Rates = dict[str, tuple[float, ...]]
Amount = tuple[int | None, int]


@dataclass(frozen=True)
class Budget:
    """Samples (None: all) and epochs while choosing and in each comparison; groups, rates, seeds.

    `choosing_settings` are added while choosing. `tried` are further trainings with the first seed:
    a group, its samples and epochs.
    """

    choosing: Amount
    finals: tuple[Amount, ...]
    groups: tuple[str, ...]
    settings: dict[str, Any]
    choosing_settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    rates: Rates = field(default_factory=dict)
    tried: tuple[tuple[str, Amount], ...] = ()


SYSTEMS = ("full-ft", "sun", "sun-lora")
BUDGETS = {
    "math": Budget(
        choosing=(16_000, 1),
        finals=((32_000, 1), (None, 2)),
        groups=(*SYSTEMS, "sun-lora-r8"),
        settings={"tune.batch_size": 64, "tune.micro_batch_size": 64},
        tried=(
            ("sun-boundary-n", (32_000, 1)),
            ("sun-mix", (32_000, 1)),
            ("full-ft-lora-r8", (32_000, 1)),
            *((group, (64_000, 1)) for group in SYSTEMS),
        ),
    ),
    "tools": Budget(
        choosing=(None, 4),
        finals=((None, 4),),
        groups=(*SYSTEMS, "sun-lora-r8"),
        settings={
            "tune.batch_size": 32,
            "tune.micro_batch_size": 16,
            "tune.generation_batch_size": 300,
        },
        choosing_settings={"tune.evaluations": 1},
        rates={"sun": (2e-4, 5e-4, 1e-3, 2e-3), "sun-lora": (5e-4, 1e-3, 2e-3)},
    ),
    "code": Budget(
        choosing=(None, 1),
        finals=((None, 2),),
        groups=(*SYSTEMS, "sun-lora-r8"),
        settings={"tune.batch_size": 64, "tune.micro_batch_size": 16},
        seeds=(1,),
        rates={"sun-lora-r8": (4e-3,)},
    ),
}


@dataclass(frozen=True)
class Training:
    """One `qsun tune`."""

    task: str
    group: str
    rate: float
    seed: int
    samples: int | None
    epochs: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Unique, and a file's name."""
        rows = "all" if self.samples is None else self.samples
        return f"{self.task}-{self.group}-{self.rate:g}-{rows}x{self.epochs}-seed{self.seed}"

    def command(self, config: Path, state: State) -> list[str]:
        """The command line; with `--resume` where a checkpoint waits."""
        group, out = GROUPS[self.group], state.out(self)
        tested = self.seed != CHOOSING_SEED
        settings = {
            "seed": self.seed,
            "tune.learning_rate": self.rate,
            "tune.epochs": self.epochs,
            "tune.evaluations": 0,
            "tune.checkpoints": 0,
            "tune.generation_batch_size": 640,
            "tune.test": str(tested).lower(),
            "tune.test_base": str(tested and (self.group, self.seed) == ("full-ft", 1)).lower(),
            **self.settings,
            **group.settings,
        }
        if self.samples is not None:
            settings["tune.samples"] = self.samples
        if group.teacher is not None:
            settings["tune.teacher"] = state.module(self.task, group.teacher).absolute()
        resumed = out.with_name(f"{out.name}.run")
        options = [f"--set={key}={value}" for key, value in settings.items()]
        if list(resumed.glob("checkpoint-*")):
            options.append("--resume")
        elif resumed.exists():
            shutil.rmtree(resumed)
        tune = [
            "tune",
            str(config),
            "--task",
            self.task,
            "--system",
            group.system,
            "--out",
            str(out),
        ]
        return [sys.executable, "-c", QSUN, *tune, *options]


class State:
    """The folder that keeps records, logs and adapters between calls."""

    def __init__(self, folder: Path, earlier: Path | None) -> None:
        self.folder = folder
        self.earlier: dict[str, dict[str, Any]] = {}
        if earlier is not None:
            self.earlier = read_record(earlier, "comparison").result["trainings"]
        for name in ("records", "runs", "logs", "modules"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def result(self, training: Training) -> dict[str, Any] | None:
        """The result of a finished training."""
        if training.name in self.earlier:
            return self.earlier[training.name]
        path = self.folder / "records" / f"{training.name}.json"
        return read_record(path, "tuning").result if path.exists() else None

    def out(self, training: Training) -> Path:
        """Where the module is published."""
        return self.folder / "runs" / training.name

    def module(self, task: str, group: str) -> Path:
        """Where the module of a group's first seed is kept."""
        return self.folder / "modules" / f"{task}-{group}"

    def keep(self, training: Training) -> None:
        """Keep the record, and the first seed's latest module; others go."""
        out = self.out(training)
        shutil.copy(
            out / "records" / "tuning.json", self.folder / "records" / f"{training.name}.json"
        )
        module = self.module(training.task, training.group)
        if training.seed != SEEDS[0]:
            shutil.rmtree(out)
            return
        if module.exists():
            shutil.rmtree(module)
        out.rename(module)


def goodness(result: dict[str, Any]) -> float:
    """What a learning rate is chosen by, on the validation rows: right answers, or little loss."""
    for evaluation in reversed(result.get("evaluations", [])):
        if "eval_accuracy" in evaluation:
            return float(evaluation["eval_accuracy"])
    return -float(result["validation_loss"][result["system"]])


def choosing(task: str) -> dict[str, list[Training]]:
    """What trains to choose each group's learning rate: one training a rate, all of one seed."""
    budget = BUDGETS[task]
    settings = budget.settings | budget.choosing_settings
    groups = dict.fromkeys((*budget.groups, *(group for group, _ in budget.tried)))
    return {
        group: [
            Training(task, group, rate, CHOOSING_SEED, *budget.choosing, settings)
            for rate in budget.rates.get(group, GROUPS[group].rates)
        ]
        for group in groups
    }


def chosen_rates(state: State, task: str) -> dict[str, float]:
    """The learning rate of each group whose choosing is over, or which has only one."""
    chosen = {}
    for group, candidates in choosing(task).items():
        by_rate = {one.rate: result for one in candidates if (result := state.result(one))}
        if len(candidates) == 1:
            chosen[group] = candidates[0].rate
        elif len(by_rate) == len(candidates):
            chosen[group] = max(by_rate, key=lambda rate: goodness(by_rate[rate]))
    return chosen


def trainings(state: State, tasks: Sequence[str]) -> Iterable[Training]:
    """All that can be started now; a group's last runs once its learning rate is chosen."""
    later, tried = [], []
    for task in tasks:
        budget, chosen = BUDGETS[task], chosen_rates(state, task)
        for candidates in choosing(task).values():
            yield from candidates if len(candidates) > 1 else ()
        for group in budget.groups:
            seeds = budget.seeds[:1] if len(GROUPS[group].rates) == 1 else budget.seeds
            if group in chosen:
                later += [
                    Training(task, group, chosen[group], seed, *final, budget.settings)
                    for final in budget.finals
                    for seed in seeds
                ]
        for group, amount in budget.tried:
            teacher = GROUPS[group].teacher
            if group in chosen and (teacher is None or state.module(task, teacher).exists()):
                tried.append(
                    Training(task, group, chosen[group], SEEDS[0], *amount, budget.settings)
                )
    yield from sorted(later, key=lambda training: training.seed)
    yield from tried


def work(
    config: Path,
    state: State,
    tasks: Sequence[str],
    gpus: Sequence[str],
    jobs: int,
    end: float,
) -> bool:
    """Run trainings until none is left (True) or the time is up (False)."""
    running: dict[subprocess.Popen[bytes], tuple[Training, str]] = {}
    failed: set[str] = set()
    while time.monotonic() < end:
        for process, (training, _) in list(running.items()):
            if process.poll() is None:
                continue
            del running[process]
            if process.returncode == 0:
                state.keep(training)
            else:
                failed.add(training.name)
            print(f"{training.name}: exit {process.returncode}", flush=True)
        busy = {training.name for training, _ in running.values()} | failed
        waiting = [
            one for one in trainings(state, tasks) if not state.result(one) and one.name not in busy
        ]
        if not waiting and not running:
            return not failed
        load = {gpu: sum(1 for _, on in running.values() if on == gpu) for gpu in gpus}
        gpu = min(load, key=lambda one: load[one])
        if waiting and load[gpu] < jobs:
            training = waiting[0]
            command = training.command(config, state)
            log = (state.folder / "logs" / f"{training.name}.log").open("ab")
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
            started = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            running[started] = training, gpu
            continue
        time.sleep(0.5)
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process, (training, _) in running.items():
        process.wait()
        print(f"{training.name}: stopped, exit {process.returncode}", flush=True)
    return False


def comparison(state: State) -> dict[str, dict[str, Any]]:
    """Every training's outcome, in short."""
    found = dict(state.earlier)
    for path in sorted((state.folder / "records").glob("*.json")):
        record = read_record(path, "tuning")
        result = record.result
        for test in result["tests"].values():
            for scored in test.values():
                scored.pop("responses", None)
        found[path.stem] = {
            "system": result["system"],
            "seed": record.seed,
            "learning_rate": record.config["tune"]["learning_rate"],
            "samples": record.config["tune"]["samples"],
            "epochs": record.config["tune"]["epochs"],
            "training": result["training"],
            "validation_loss": result["validation_loss"],
            "evaluations": result["evaluations"],
            "tests": result["tests"],
            "command": record.command,
            "created": record.created,
            "versions": record.versions,
            "hardware": record.hardware,
        }
    return dict(sorted(found.items()))


def main() -> None:
    """Work through the plan for a while."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--gpus", default="0", help="numbers, with commas")
    parser.add_argument("--jobs", type=int, default=5, help="trainings at a time on each GPU")
    parser.add_argument("--earlier", type=Path, help="a record of this script: what it has is done")
    parser.add_argument("--tasks", default=",".join(BUDGETS), help="names, with commas")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    state = State(arguments.state, arguments.earlier)
    gpus = arguments.gpus.split(",")
    tasks = arguments.tasks.split(",")
    done = work(arguments.config, state, tasks, gpus, arguments.jobs, end)
    run = load_config(arguments.config)
    found = comparison(state)
    result = {
        "finished": done,
        "budgets": {task: asdict(budget) for task, budget in BUDGETS.items()},
        "chosen": {task: chosen_rates(state, task) for task in BUDGETS},
        "trainings": found,
    }
    new_record("comparison", run, run.seed, result).write(state.folder / "comparison.json")
    print(json.dumps({"finished": done, "trainings": len(found)}))


if __name__ == "__main__":
    main()
