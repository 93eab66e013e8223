"""The dry run of an evaluation: what it would need, planned without weights, nothing written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsun.checkpoint_files import read_config_file
from qsun.evaluate.estimate import Asked, EvaluationEstimate, estimate
from qsun.jobs.plan_model import planned_model
from qsun.jobs.plan_rows import asked_of
from qsun.jobs.prepare_evaluate import PreparedEvaluation
from qsun.skeleton import skeleton


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation that was not started: each test set's prompts, and what they would need."""

    asked: Mapping[str, Asked]
    estimate: EvaluationEstimate


def plan_evaluation(prepared: PreparedEvaluation) -> EvaluationPlan:
    """Estimate what was prepared.

    Raises:
        QsunError: the model's config or a task's definition cannot be read.
    """
    config = _model_config(prepared)
    asked = {one.name: asked_of(one, prepared.request.limit) for one in prepared.tests}
    systems = {one.name: prepared.systems[one.task] for one in prepared.tests}
    batch_size = prepared.request.settings.batch_size
    expected = estimate(config, skeleton(config), asked, systems, batch_size)
    return EvaluationPlan(asked, expected)


def _model_config(prepared: PreparedEvaluation) -> dict[str, Any]:
    """The dense model's: a quantized one is evaluated as what its codes mean."""
    bundle, run = prepared.subject.bundle, prepared.request.run
    if bundle is not None:
        config = read_config_file(bundle.decode / "config.json")
    else:
        assert run is not None, "an evaluation is of a bundle or of a config"
        _, config = planned_model(run, prepared.subject.relative_to)
    return {key: value for key, value in config.items() if key != "quantization_config"}
