"""The dry run of a tuning: what it would do and need, planned without weights, nothing written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qsun.config import RunConfig
from qsun.files import free_bytes, size
from qsun.jobs.check_tune import check_model, check_settings, definition_of
from qsun.jobs.plan_model import planned_model
from qsun.jobs.plan_rows import rows_of
from qsun.jobs.prepare_export import resolved
from qsun.skeleton import skeleton
from qsun.tasks.definition import TaskDefinition, load_task
from qsun.tune.estimate import Rows, TuningEstimate, estimate


@dataclass(frozen=True)
class TuningPlan:
    """A tuning that was not started. `missing` are folders that are not there yet."""

    run: RunConfig
    system: str
    task: TaskDefinition
    parameters: int
    rows: Rows
    estimate: TuningEstimate
    missing: tuple[Path, ...]
    out: Path

    @property
    def warnings(self) -> list[str]:
        """What a user should know before starting, none of it forbidden."""
        free = free_bytes(self.out)
        if self.estimate.disk_bytes <= free:
            return []
        return [
            f"about {size(self.estimate.disk_bytes)} of disk are needed at {self.out.parent}, "
            f"{size(free)} are free"
        ]


def plan_tuning(
    run: RunConfig, config_path: Path, task_name: str, system: str, out: Path
) -> TuningPlan:
    """Check the settings against the model's shape, and estimate.

    Raises:
        QsunError: whatever would stop the run later and can be known now.
    """
    relative_to = config_path.absolute().parent
    definition = definition_of(run, task_name, relative_to)
    task = load_task(definition)
    check_settings(run, system)
    _, model_config = planned_model(run, relative_to)
    check_model(run, task, model_config)
    shape = skeleton(model_config)
    rows = rows_of(task, definition.parent, run.tune.samples)
    needed = (
        run.tune.decode if system == "qsun" else None,
        run.tune.teacher if run.tune.loss != "nll" else None,
    )
    folders = [resolved(path, relative_to) for path in needed if path is not None]
    missing = tuple(folder for folder in folders if not folder.is_dir())
    expected = estimate(model_config, shape, rows, run.tune, system)
    return TuningPlan(run, system, task, shape.parameters, rows, expected, missing, out)
