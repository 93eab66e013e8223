"""The model that a dry run plans for: its config alone, from `base.config` where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.checkpoint_files import read_config_file
from qsun.config import RunConfig
from qsun.models import ModelSource, locate, read_config


def planned_model(run: RunConfig, relative_to: Path) -> tuple[ModelSource, dict[str, Any]]:
    """Where the base model would come from, and its `config.json` without asking the hub for it.

    Raises:
        ModelError: no `base.config`, and the model's own config cannot be read.
    """
    if run.base.config is not None:
        source = ModelSource(hub_id=run.base.model, revision=run.base.revision)
        return source, read_config_file(relative_to / run.base.config)
    source = locate(run.base.model, run.base.revision, relative_to)
    return source, read_config(source)
