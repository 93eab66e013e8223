"""The plan of `compare_bits`: every job of a study, in its order, as functions of a folder.

STATE/calib and STATE/configs/*.yaml are as in the repository, so that commands can be read there:
`configs/run.yaml` names the converted base model and the tasks with their rows at hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from qsun.jobs.evaluate import SCORECARD
from qsun.jobs.evaluation_state import IDENTITY
from qsun.records import read_record
from tests.gpu.bits_study import Amount, Budget, Study
from tests.gpu.compare_systems import QSUN
from tests.gpu.job_runner import Job

CHOOSING_SEED = 0
QUANTIZE_GIB, SCORE_GIB = 8, 28
LEAST_S = {"quantize": 45, "tune": 40, "evaluate": 60}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"tune.module": "lora", "tune.lora.rank": 64, "tune.lora.alpha": 128},
    "kl": {"tune.loss": "kl"},
    "mix": {"tune.loss": "mix"},
}
LORA_RATE = 2e-3  # chosen for math's LoRA modules in docs/records/sun-comparison.json
Command = Callable[[], list[str]]


class Plan:
    """All jobs of a study in its folder."""

    def __init__(self, study: Study, folder: Path, evaluate: bool) -> None:
        self.study, self.folder, self.evaluate = study, folder, evaluate

    def jobs(self) -> list[Job]:
        """Every job; those of lesser `order` are wanted first."""
        found = [*self._materials(), *self._decodes()]
        for task in self.study.budgets:
            found += [*self._references(task), *self._choosing(task)]
            for seed in self.study.seeds:
                found += self._seed(task, seed)
            found += self._variants(task)
        return [job for job in found if self.evaluate or "/score-" not in job.name]

    def tunings(self) -> list[str]:
        """The names of the jobs that tune a module."""
        return [self._short(job) for job in self.jobs() if job.done.name == "tuning.json"]

    def rate(self, task: str, bits: int) -> float | None:
        """System qsun's learning rate; None while it is being chosen."""
        budget = self.study.budgets[task]
        tried = budget.tried.get(bits, (budget.sun,))
        if len(tried) == 1:
            return tried[0]
        paths = {rate: self._record(_try_name(task, bits, rate)) for rate in tried}
        if not all(path.exists() for path in paths.values()):
            return None
        losses = {
            rate: read_record(path, "tuning").result["validation_loss"]["qsun"]
            for rate, path in paths.items()
        }
        return min(losses, key=lambda rate: float(losses[rate]))

    def write_configs(self) -> None:
        """Write `configs/run.yaml`, and `configs/pretrain.yaml` where there is pretraining."""
        quantize = {
            "engine": "llmcompressor",
            "calibration": "../calib/math-tools.yaml",
            "heldout": "../calib/heldout.yaml",
            "group_size": 64,
            "grid_points": 10,
        }
        run = {
            "name": f"{self.study.name}-bits",
            "base": {"model": "../base"},
            "tasks": [f"../tasks/{task}.yaml" for task in self.study.budgets],
            "quantize": quantize,
            "load_check": {"mode": "skip"},
        }
        self._write_config("run", run)
        pretrain = {
            "name": f"{self.study.name}-base",
            "base": {"model": "../init"},
            "tasks": ["../tasks/mix.yaml"],
        }
        if self.study.pretraining is not None:
            self._write_config("pretrain", pretrain)

    def _write_config(self, name: str, values: dict[str, Any]) -> None:
        path = self.folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def _name(self, short: str) -> str:
        return f"{self.study.name}/{short}"

    def _short(self, job: Job) -> str:
        return job.name.rpartition("/")[2]

    def _record(self, short: str) -> Path:
        return self.folder / "runs" / short / "records" / "tuning.json"

    def _job(self, short: str, order: int, command: Command, done: Path, **changes: Any) -> Job:
        needs = tuple(self._name(need) for need in changes.pop("needs", ()))
        return Job(self._name(short), self.folder, command, done, needs, order, **changes)

    def _module(
        self, short: str, order: int, argv: list[str], done: str, needs: tuple[str, ...] = ()
    ) -> Job:
        command = [sys.executable, "-m", *argv]
        return self._job(short, order, lambda: command, self.folder / done, needs=needs)

    def _materials(self) -> Iterator[Job]:
        materials, study = "tests.gpu.bits_materials", self.study
        start = "init" if study.pretraining else "base"
        converted = "converted" if study.pretraining else "base"
        yield self._module(
            converted, 0, [materials, "base", study.base, converted], f"{converted}/config.json"
        )
        size = [f"--rows={study.rows}", f"--max-tokens={study.max_tokens}"]
        size.append(f"--max-new-tokens={study.max_new_tokens}")
        for task in study.budgets:
            skip = f"--skip={study.skipped.get(task, 0)}"
            argv = [materials, "task", f"calib/tasks/{task}.yaml", "tasks", skip, *size]
            yield self._module(f"task-{task}", 0, argv, f"tasks/{task}.yaml")
        if study.pretraining is None:
            return
        mixed = [f"calib/tasks/{task}.yaml" for task in study.budgets]
        argv = [materials, "mix", *mixed, "--out=tasks", *size]
        yield self._module("task-mix", 0, argv, "tasks/mix.yaml")
        argv = ["tests.gpu.small_qwen3", converted, start]
        yield self._module("init", 0, argv, "init/config.json", (converted,))
        yield self._pretraining(study.pretraining)

    def _pretraining(self, budget: Budget) -> Job:
        settings = {"seed": CHOOSING_SEED, "tune.learning_rate": budget.full_ft, "tune.test": False}
        settings |= budget.settings(budget.amount)
        arguments = _tune("pretrain", "mix", "full-ft", "base", settings)
        return self._job(
            "base",
            1,
            lambda: self._qsun(arguments, "base"),
            self.folder / "base" / "records" / "tuning.json",
            needs=("task-mix", "init"),
            gib=budget.gib,
            least_s=LEAST_S["tune"],
            unfinished=self.folder / "base.run",
        )

    def _qsun(self, arguments: list[str], out: str) -> list[str]:
        """The command line; with `--resume` where a checkpoint, or finished samples, wait."""
        waiting = [
            *self.folder.glob(f"{out}.run/checkpoint-*"),
            *self.folder.glob(f"{out}.evaluation/{IDENTITY}"),
        ]
        return [sys.executable, "-c", QSUN, *arguments, *(["--resume"] if waiting else [])]

    def _decodes(self) -> Iterator[Job]:
        own = self.study.decode_config != "run"  # a config that converts the base model itself
        for bits in self.study.bits:
            yield self._quantizing(
                f"decode-w{bits}",
                1,
                f"decode/w{bits}",
                self.study.decode_config,
                {"quantize.bits": bits, "load_check.mode": "skip"},
                () if own else ("base",),
            )

    def _quantizing(
        self,
        short: str,
        order: int,
        out: str,
        config: str,
        settings: dict[str, Any],
        needs: tuple[str, ...],
    ) -> Job:
        arguments = ["quantize", f"configs/{config}.yaml", "--out", out, *_overrides(settings)]
        return self._job(
            short,
            order,
            lambda: self._qsun(arguments, out),
            self.folder / out / "config.json",
            needs=needs,
            gib=QUANTIZE_GIB,
            least_s=LEAST_S["quantize"],
        )

    def _tuning(
        self,
        short: str,
        order: int,
        task: str,
        system: str,
        settings: Callable[[], dict[str, Any]],
        needs: tuple[str, ...],
        config: str = "run",
        reserved: bool = False,
    ) -> Job:
        out = f"runs/{short}"
        return self._job(
            short,
            order,
            lambda: self._qsun(_tune(config, task, system, out, settings()), out),
            self._record(short),
            needs=needs,
            gib=self.study.budgets[task].gib,
            least_s=LEAST_S["tune"],
            unfinished=self.folder / f"{out}.run",
            reserved=reserved,
        )

    def _settings(self, task: str, seed: int, rate: float | None, **more: Any) -> dict[str, Any]:
        """A comparison's training; a rate that is not chosen yet shows as CHOSEN."""
        budget = self.study.budgets[task]
        amount: Amount = more.pop("amount", budget.amount)
        settings = {"seed": seed, "tune.learning_rate": "CHOSEN" if rate is None else rate}
        return settings | budget.settings(amount) | {"tune.test": False} | more

    def _references(self, task: str) -> Iterator[Job]:
        """A LoRA module for the 4-bit decode module, of the shipped config and task."""
        budget = self.study.budgets[task]
        if budget.reference is None:
            return
        shipped = self.study.decode_config != "run"
        bits = max(self.study.bits)
        lora = {"tune.module": "lora", "tune.lora.rank": 8, "tune.lora.alpha": 16}
        changes = {"amount": budget.reference, **lora, "tune.decode": f"../decode/w{bits}"}
        if shipped:
            generation = {"tune.generation_batch_size": budget.generation_batch_size}
            changes |= {"tune.test": True, "tune.test_base": False, **generation}
        needs = (f"decode-w{bits}", *(() if shipped else ("base", f"task-{task}")))
        yield self._tuning(
            f"reference-{task}",
            2,
            task,
            "qsun",
            lambda: self._settings(task, 1, LORA_RATE, **changes),
            needs,
            "smollm2-135m-sun" if shipped else "run",
            reserved=True,
        )

    def _choosing(self, task: str) -> Iterator[Job]:
        budget = self.study.budgets[task]
        for bits, rates in budget.tried.items():
            for rate in rates if bits in self.study.bits else ():
                yield self._qsun_tuning(
                    _try_name(task, bits, rate), 3, task, bits, CHOOSING_SEED, rate
                )

    def _qsun_tuning(
        self,
        short: str,
        order: int,
        task: str,
        bits: int,
        seed: int,
        rate: float | None = None,
        changes: dict[str, Any] | None = None,
        needs: tuple[str, ...] = (),
    ) -> Job:
        """A module tuned through D at `bits`, at the chosen rate if none is given."""
        budget = self.study.budgets[task]
        amount = budget.choosing if seed == CHOOSING_SEED else budget.amount
        tried = budget.tried.get(bits, ()) if rate is None else ()
        more = {"amount": amount, "tune.decode": f"../decode/w{bits}", **budget.module}
        more |= changes or {}
        return self._tuning(
            short,
            order,
            task,
            "qsun",
            lambda: self._settings(task, seed, rate or self.rate(task, bits), **more),
            (
                "base",
                f"task-{task}",
                f"decode-w{bits}",
                *(_try_name(task, bits, one) for one in tried if len(tried) > 1),
                *needs,
            ),
        )

    def _seed(self, task: str, seed: int) -> Iterator[Job]:
        """All that one seed of a task needs: modules, their quantized rivals, scores."""
        budget = self.study.budgets[task]
        order = 10 * seed + self.study.late
        needs = ("base", f"task-{task}")
        tuned, full_ft = f"{task}-sun-seed{seed}", f"{task}-full-ft-seed{seed}"
        for short, system, rate, soon in (
            (full_ft, "full-ft", budget.full_ft, 0),
            (tuned, "sun", budget.sun, 1),
        ):
            module = budget.module if system == "sun" else {}
            settings = partial(self._settings, task, seed, rate, **module)
            yield self._tuning(short, order + soon, task, system, settings, needs)
        modules = {"full_ft": full_ft, "sun": tuned}
        systems = ["base"] if seed == self.study.seeds[0] else []
        yield self._score(task, f"seed{seed}", seed, [*systems, "full-ft", "naive", "sun"], modules)
        for bits in self.study.bits:
            low_bit, rival = (f"{task}-{what}-w{bits}-seed{seed}" for what in ("qsun", "awq"))
            yield self._qsun_tuning(low_bit, order + 1, task, bits, seed)
            base = {"seed": seed, "base.model": f"../runs/{full_ft}", "quantize.bits": bits}
            yield self._quantizing(rival, order + 2, f"runs/{rival}", "run", base, (full_ft,))
            modules = {"awq_full_ft": rival, "sun": tuned, "qsun": low_bit}
            systems = ["awq-full-ft", "qsun-post", "qsun"]
            yield self._score(task, f"w{bits}-seed{seed}", seed, systems, modules, bits)

    def _variants(self, task: str) -> Iterator[Job]:
        """Other losses and a LoRA module, on math with the first seed."""
        seed = self.study.seeds[0]
        teacher = f"{task}-full-ft-seed{seed}"
        for bits in self.study.variant_bits if task == "math" else ():
            for variant, changes in VARIANTS.items():
                lora = variant == "lora"
                taught = {} if lora else {"tune.teacher": f"../runs/{teacher}"}
                short = f"{task}-qsun-w{bits}-{variant}-seed{seed}"
                yield self._qsun_tuning(
                    short,
                    40,
                    task,
                    bits,
                    seed,
                    LORA_RATE if lora else None,
                    changes | taught,
                    () if lora else (teacher,),
                )
                label = f"w{bits}-{variant}-seed{seed}"
                yield self._score(task, label, seed, ["qsun"], {"qsun": short}, bits, 41)

    def _score(
        self,
        task: str,
        label: str,
        seed: int,
        systems: list[str],
        modules: dict[str, str],
        bits: int | None = None,
        order: int | None = None,
    ) -> Job:
        name = f"{task}-{label}"
        needs = [*modules.values(), *([] if bits is None else [f"decode-w{bits}"])]
        out = f"scores/{name}"

        def command() -> list[str]:
            self._write_config(f"score-{name}", self._score_config(task, seed, modules, bits))
            config = f"configs/score-{name}.yaml"
            chosen = ["--systems", ",".join(systems)]
            return self._qsun(["evaluate", config, *chosen, "--out", out], out)

        return self._job(
            f"score-{name}",
            10 * seed + self.study.late + 3 if order is None else order,
            command,
            self.folder / out / SCORECARD,
            needs=tuple(needs),
            gib=SCORE_GIB,
            least_s=LEAST_S["evaluate"],
            unfinished=self.folder / f"{out}.evaluation",
            checkpoints=IDENTITY,
        )

    def _score_config(
        self, task: str, seed: int, modules: dict[str, str], bits: int | None
    ) -> dict[str, Any]:
        folders = {system: f"../runs/{short}" for system, short in modules.items()}
        evaluate: dict[str, Any] = {
            "modules": [{"task": task, **folders}],
            "batch_size": self.study.budgets[task].generation_batch_size,
            "tpot": "skip",
        }
        if bits is not None:
            evaluate["decode"] = f"../decode/w{bits}"
        return {
            "name": f"{self.study.name}-{task}",
            "base": {"model": "../base"},
            "tasks": [f"../tasks/{task}.yaml"],
            "seed": seed,
            "evaluate": evaluate,
        }


def _try_name(task: str, bits: int, rate: float) -> str:
    return f"{task}-qsun-w{bits}-try{rate:g}"


def _tune(config: str, task: str, system: str, out: str, settings: dict[str, Any]) -> list[str]:
    named = ["--task", task, "--system", system, "--out", out]
    return ["tune", f"configs/{config}.yaml", *named, *_overrides(settings)]


def _overrides(settings: dict[str, Any]) -> list[str]:
    texts = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in settings.items()
    }
    return [f"--set={key}={value}" for key, value in texts.items()]
