"""The trainer: transformers', with qsun's batches, checkpoints, evaluation and logs."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qsun.config import RunConfig
from qsun.processes import count
from qsun.progress import announce
from qsun.tune.batches import MicroBatches, model_inputs
from qsun.tune.graphs import SHAPE_STEP, StepGraphs
from qsun.tune.log import Log, StepLosses, mean_loss
from qsun.tune.modules import TunedModules

WEIGHTS = "trained.safetensors"
STATE = "trainer_state.json"  # the last file that transformers writes into a checkpoint
LOG_EVERY = 10  # steps: reading a loss waits for the accelerator
Evaluation = Callable[[], dict[str, float]]


class HandoffTrainer(Trainer):
    """Trains `TunedModules` on `MicroBatches`, judged by the task's own accuracy."""

    control: Any

    def __init__(
        self,
        modules: TunedModules,
        data: MicroBatches,
        evaluation: Evaluation,
        losses: StepLosses,
        graphs: StepGraphs | None,
        **kwargs: Any,
    ) -> None:
        shape_step = SHAPE_STEP if graphs is not None else 1
        super().__init__(
            model=modules,
            train_dataset=data,
            eval_dataset=data,  # never read: `evaluate` has rows of its own
            data_collator=lambda items: model_inputs(items[0], shape_step),
            **kwargs,
        )
        self._evaluation, self._losses, self._graphs = evaluation, losses, graphs

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One micro-batch; its share of the step's loss is kept."""
        if self._graphs is None:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            loss = self._graphs(self._prepare_inputs(inputs), num_items_in_batch)
        self._losses.add(loss)
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset or self.train_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The prefill module as it would be served now, on the validation rows."""
        metrics = {f"eval_{name}": value for name, value in self._evaluation().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.cpu() for name, weight in self.model.trained_weights().items()}
        save_file(weights, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.restore(load_file(Path(resume_from_checkpoint) / WEIGHTS))


class OneGpuArguments(TrainingArguments):
    """A process trains on one GPU, however many it sees.

    For more than one, transformers' Trainer would put `torch.nn.DataParallel` around modules whose
    decode module, caches and batches lie on the process's own.
    """

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: 1, or 0 on CPU."""
        return min(1, int(super().n_gpu))


class _Stop(TrainerCallback):
    """Ends training after the step under way, with a checkpoint, once it was asked to."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


@contextmanager
def _stopping(stop: _Stop) -> Iterator[None]:
    """Signals ask `stop`; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        announce("interrupted: saving a checkpoint after this step; once more to stop at once")

    before = {ending: signal.signal(ending, ask) for ending in endings}
    try:
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)


def train(
    run: RunConfig,
    modules: TunedModules,
    data: MicroBatches,
    evaluation: Evaluation,
    folder: Path,
    resume: bool,
) -> dict[str, Any] | None:
    """Train to the end; gives steps, mean loss and seconds, or None where it was stopped.

    Checkpoints, `log.jsonl` and TensorBoard's `events` grow in `folder`.

    Raises:
        torch.OutOfMemoryError: from the accelerator.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    losses, stop = StepLosses(), _Stop()
    log = Log(folder / "log.jsonl", run.tune.epochs, losses)
    checkpoint = last_checkpoint(folder) if resume else None
    trainer = HandoffTrainer(
        modules,
        data,
        evaluation,
        losses,
        StepGraphs(modules) if run.tune.cuda_graphs else None,
        args=_arguments(run, data.steps, folder, checkpoint is not None),
        callbacks=[log, stop],
    )
    # Else each process would train alone, on a part of every batch.
    assert trainer.args.world_size == count(), f"{trainer.args.world_size} of {count()} processes"
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    started = time.monotonic()
    with _stopping(stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        return None
    return {
        "steps": trainer.state.global_step,
        "train_loss": mean_loss(folder / "log.jsonl"),
        "seconds": round(time.monotonic() - started, 2),
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _arguments(run: RunConfig, steps: int, folder: Path, resumed: bool) -> OneGpuArguments:
    tune = run.tune
    return OneGpuArguments(
        output_dir=str(folder),
        seed=run.seed,
        data_seed=run.seed,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=math.ceil(tune.batch_size / (tune.micro_batch_size * count())),
        learning_rate=tune.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(tune.warmup * steps),
        weight_decay=tune.weight_decay,
        max_grad_norm=tune.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=LOG_EVERY,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if tune.evaluations else "no",
        eval_steps=_every(steps, tune.evaluations),
        eval_on_start=tune.evaluations > 1 and not resumed,
        save_strategy="steps" if tune.checkpoints else "no",
        save_steps=_every(steps, tune.checkpoints),
        save_total_limit=2,
        report_to=["tensorboard"],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=True,
    )


def _every(steps: int, times: int) -> int:
    return max(1, math.ceil(steps / max(times, 1)))
