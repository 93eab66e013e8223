"""The log of a training: every step's loss and every evaluation, as lines of JSON, and the bar."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qsun.processes import gather
from qsun.progress import announce, bar


class StepLosses:
    """Each step's loss (nats a response token), left on the accelerator until it is taken."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._steps: list[tuple[int, torch.Tensor]] = []

    def add(self, part: torch.Tensor) -> None:
        """A micro-batch's share of the step under way."""
        self._parts.append(part)

    def end(self, step: int) -> None:
        """The step is done."""
        self._steps.append((step, torch.stack(self._parts).sum()))
        self._parts = []

    def take(self) -> dict[int, float]:
        """The losses since the last call, by step; the mean over all processes."""
        steps, self._steps = self._steps, []
        losses = [loss.item() for _, loss in steps]
        every = gather([losses])
        means = [math.fsum(of_step) / len(every) for of_step in zip(*every, strict=True)]
        return dict(zip((step for step, _ in steps), means, strict=True))


class Log(TrainerCallback):
    """Every step's loss and all else that is logged as lines of JSON, and the bar."""

    def __init__(self, path: Path, epochs: int, losses: StepLosses) -> None:
        self._path, self._epochs, self._losses = path, epochs, losses
        self._open = ExitStack()
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, where an earlier run of the same training stopped."""
        if state.is_world_process_zero:
            self._bar = self._open.enter_context(bar("training", state.max_steps))
            self._bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's loss is complete."""
        self._losses.end(state.global_step)
        if self._bar is not None:
            self._bar.update(1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint leaves no loss behind."""
        self._write_losses(state)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The losses so far, and what the trainer itself has to say."""
        self._write_losses(state)
        if not state.is_world_process_zero or not logs:
            return
        # The trainer sees one pass over all micro-batches, whatever the number of epochs; its mean
        # loss would not survive an interruption.
        epoch = round(logs.get("epoch", 0.0) * self._epochs, 4)
        values = {key: value for key, value in logs.items() if key != "loss"}
        self._write([{"step": state.global_step, **values, "epoch": epoch}])
        if "eval_loss" in logs and self._bar is not None:
            shown = {key: value for key, value in logs.items() if key.startswith("eval_")}
            announce(f"step {state.global_step}: " + _values(shown))
        elif "loss" in logs and self._bar is not None:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4g}", refresh=False)

    def _write_losses(self, state: Any) -> None:
        losses = self._losses.take()
        if state.is_world_process_zero:
            self._write([{"step": step, "loss": loss} for step, loss in losses.items()])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._open.close()


def _values(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in metrics.items())


def mean_loss(log: Path) -> float:
    """Over all steps, those before an interruption too."""
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return math.fsum(losses.values()) / len(losses)
