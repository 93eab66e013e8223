"""Tunings that cannot work: refused with a message that says what would, and nothing left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qsun.errors import (
    ConfigError,
    DataError,
    Interrupted,
    ModelError,
    OutputError,
    QsunError,
    ResourceError,
)
from qsun.tune.batches import MicroBatches
from tests.builders import CONTEXT, problems, tiny_model, write_jsonl
from tests.command import run_qsun
from tests.tuning import source, tune, write_run, write_task


def refused(
    config: Path, error: type[QsunError], system: str = "sun", *options: str, left: int = 0
) -> str:
    """Run `qsun tune`, which must end with the error's exit code and leave nothing behind."""
    outcome = tune(config, system, *options)
    assert outcome.exit_code == error.exit_code, outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert len(list((config.parent / "out").iterdir())) == left
    return outcome.message


@pytest.fixture(scope="session")
def other_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another number of KV heads."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tiny_model(folder, kv_heads=4)
    return folder


def test_an_unknown_task_is_named_beside_the_known(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder)
    outcome = run_qsun("tune", config, "--task", "tsk", "--out", tmp_path / "out" / "module")
    assert outcome.exit_code == 3
    assert "--task tsk: the config has no such task (it has task)" in outcome.message
    assert not (tmp_path / "out").exists()


def test_a_config_without_tasks_says_where_they_are_listed(
    tmp_path: Path, tiny_folder: Path
) -> None:
    config = write_run(tmp_path, tiny_folder, tasks=[])
    assert "list task definitions under `tasks`" in refused(config, ConfigError)


def test_a_missing_task_file_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder)
    (tmp_path / "task.yaml").unlink()
    assert f"{tmp_path / 'task.yaml'}: No such file or directory" in refused(config, ConfigError)


def with_task(folder: Path, model: Path, **changes: Any) -> Path:
    write_task(folder, **changes)
    return write_run(folder, model)


def test_a_task_file_names_all_its_mistakes(tmp_path: Path, tiny_folder: Path) -> None:
    config = with_task(
        tmp_path,
        tiny_folder,
        train=[source("train"), source("train"), source("raw", response=None)],
        tests=[source("tests"), source("text", prompt=None, response=None, text="t", answer="t")],
        checker=None,
    )
    message = refused(config, ConfigError)
    assert "task.yaml has 5 mistake(s)" in message
    assert "train: two sources have one name" in message
    assert "train: source raw: a prompt needs a response beside it" in message
    assert "tests: source tests: a test needs answer" in message
    assert "tests: source text: a task needs prompt or messages, not text" in message
    assert "checker: tests need one of final-number" in message


def test_unknown_keys_of_a_task_file(tmp_path: Path, tiny_folder: Path) -> None:
    config = with_task(tmp_path, tiny_folder, chcker="exact-match", checker="exact")
    message = refused(config, ConfigError)
    assert "2 mistake(s)" in message
    assert "chcker: no such setting (did you mean checker?)" in message
    assert "checker: 'exact' is not one of" in message
    assert "exact-match" in message


def test_unknown_keys_of_the_tune_section(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__bach_size=8, tune__boundary="n-2")
    message = refused(config, ConfigError)
    assert "tune.bach_size: no such setting (did you mean batch_size?)" in message
    assert "tune.boundary: 'n-2' is not one of n-1, n" in message


def test_a_missing_column_lists_the_rows_own(tmp_path: Path, tiny_folder: Path) -> None:
    config = with_task(tmp_path, tiny_folder, train=[source("train", response="answer")])
    message = refused(config, DataError)
    assert "source train: there is no column 'answer'" in message
    assert "its columns are prompt, response" in message


def test_a_missing_rows_file_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder)
    (tmp_path / "train.jsonl").unlink()
    assert f"cannot read {tmp_path / 'train.jsonl'}" in refused(config, DataError)


def test_too_few_rows_name_what_took_them(tmp_path: Path, tiny_folder: Path) -> None:
    config = with_task(tmp_path, tiny_folder, validation_samples=48)
    message = refused(config, DataError)
    assert "task task: no training rows are left beside 48 for validation" in message
    assert "lower validation_samples" in message


def test_training_rows_that_are_tests_do_not_count(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder)
    write_jsonl(tmp_path / "tests.jsonl", problems(48, seed=1))
    message = refused(config, DataError)
    assert "no training rows are left" in message
    assert "48 that are tests" in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_prompts_that_leave_no_room_for_a_response(
    tmp_path: Path, tiny_folder: Path, split: str
) -> None:
    changes: dict[str, Any] = {"max_tokens": 60}
    config = with_task(tmp_path, tiny_folder, **changes, **{split: [source("long")]})
    rows = [row | {"prompt": 5 * row["prompt"]} for row in problems(24, seed=1)]
    write_jsonl(tmp_path / "long.jsonl", rows)
    message = refused(config, DataError)
    assert f"task {split}: no response tokens are left" in message
    assert "max_tokens (60) or more" in message
    assert "Raise max_tokens in the task's definition" in message


def test_more_tokens_than_the_models_context(tmp_path: Path, tiny_folder: Path) -> None:
    config = with_task(tmp_path, tiny_folder, max_tokens=CONTEXT + 1)
    message = refused(config, ConfigError)
    assert f"max_tokens {CONTEXT + 1}" in message
    assert f"above the model's max_position_embeddings {CONTEXT}" in message


def test_a_decode_module_of_another_shape(
    tmp_path: Path, tiny_folder: Path, tiny_module: Path, other_shape: Path
) -> None:
    config = write_run(tmp_path, other_shape, tune__decode=str(tiny_module))
    message = refused(config, ModelError, "qsun")
    assert f"tune.decode: {tiny_module} has another KV layout than the base model" in message
    assert "kv_heads" in message
    assert "Use a module made from this base model" in message


def test_a_teacher_of_another_shape(tmp_path: Path, tiny_folder: Path, other_shape: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__loss="kl", tune__teacher=str(other_shape))
    message = refused(config, ModelError)
    assert f"tune.teacher: {other_shape} has another KV layout" in message


def test_modules_that_are_and_are_not_quantized(
    tmp_path: Path, tiny_folder: Path, tiny_module: Path
) -> None:
    dense = write_run(tmp_path / "dense", tiny_folder, tune__decode=str(tiny_folder))
    assert f"tune.decode: {tiny_folder} is not quantized" in refused(dense, ModelError, "qsun")
    teacher = {"tune__loss": "kl", "tune__teacher": str(tiny_module)}
    quantized = write_run(tmp_path / "quantized", tiny_folder, **teacher)
    assert f"tune.teacher: {tiny_module} is quantized" in refused(quantized, ModelError)


def test_a_module_folder_that_is_not_there(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__decode="../nowhere")
    message = refused(config, ModelError, "qsun")
    assert f"there is no module folder at {(tmp_path / '../nowhere').resolve()}" in message


def test_what_a_system_and_a_loss_need_is_said_at_once(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__loss="kl", tune__batch_size=10)
    message = refused(config, ConfigError, "qsun")
    assert "tune.batch_size 10 is no multiple of 4" in message
    assert "system qsun needs tune.decode" in message
    assert "by `qsun quantize`" in message
    assert "tune.loss kl needs tune.teacher" in message


def test_full_fine_tuning_has_no_boundary(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__boundary="n")
    assert "system full-ft has no boundary" in refused(config, ConfigError, "full-ft")


def test_a_batch_of_more_rows_than_there_are(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__batch_size=128)
    message = refused(config, ConfigError)
    assert "tune.batch_size 128 is more than all 120 training rows: lower it" in message


def test_adapter_targets_that_the_model_has_not(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(
        tmp_path, tiny_folder, tune__module="lora", tune__lora={"targets": ["q_prj", "k_proj"]}
    )
    assert "q_prj" in refused(config, ConfigError)


def test_an_output_in_use_is_left_alone(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder)
    out = tmp_path / "out" / "module"
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    message = refused(config, OutputError, left=1)
    assert f"output {out} already exists and is not an empty folder" in message
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_an_answer_that_the_checker_cannot_read(tmp_path: Path, tiny_folder: Path) -> None:
    config = with_task(tmp_path, tiny_folder, checker="final-number")
    rows = [row | {"response": "many"} for row in problems(4, seed=2)]
    write_jsonl(tmp_path / "tests.jsonl", rows)
    message = refused(config, DataError)
    assert "checker final-number: an answer has no number: 'many'" in message


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_memory_that_runs_out_names_the_settings_that_save_it(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path, tiny_folder)
    fetch = MicroBatches.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(
            MicroBatches,
            "__getitem__",
            lambda self, index: fetch(self, index) if index < 14 else out_of_memory(),
        )
        message = refused(config, ResourceError, left=1)
    assert "memory ran out at tune.micro_batch_size 4, tune.generation_batch_size 64" in message
    assert "tune.gradient_checkpointing=true" in message
    assert "--resume" in message
    run = tmp_path / "out" / "module.run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-5"]


def test_memory_that_runs_out_before_training(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsun.tune.judge.generate", out_of_memory)
    refused(write_run(tmp_path, tiny_folder), ResourceError)


@pytest.fixture(scope="module")
def interrupted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that waits to be gone on with; change only copies."""
    config = write_run(tmp_path_factory.mktemp("interrupted") / "run", tiny_folder)
    fetch = MicroBatches.__getitem__

    def stop(self: MicroBatches, index: int) -> Any:
        if index == 12:  # after the checkpoint of step 5
            raise KeyboardInterrupt
        return fetch(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatches, "__getitem__", stop)
        outcome = tune(config)
    assert outcome.exit_code == Interrupted.exit_code
    return config


@pytest.fixture
def waiting(interrupted: Path, tmp_path: Path) -> Path:
    shutil.copytree(interrupted.parent, tmp_path / "run")
    return tmp_path / "run" / "run.yaml"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


def test_resuming_with_other_settings_names_every_one(waiting: Path) -> None:
    edit(waiting, lambda run: run["tune"].update(learning_rate=0.1, batch_size=4))
    edit(waiting.with_name("task.yaml"), lambda task: task.update(max_tokens=64))
    message = refused(waiting, ConfigError, "sun", "--resume", left=1)
    run = waiting.parent / "out" / "module.run"
    assert f"--resume: the run in {run} was started differently" in message
    assert "run.tune.learning_rate: 0.003 then, 0.1 now" in message
    assert "run.tune.batch_size: 8 then, 4 now" in message
    assert "task.max_tokens: 128 then, 64 now" in message
    assert message.count(" then, ") == 3
    assert "Restore these settings, or remove the folder" in message


def test_resuming_as_another_system(waiting: Path) -> None:
    message = refused(waiting, ConfigError, "full-ft", "--resume", left=1)
    assert "system: 'sun' then, 'full-ft' now" in message


def test_resuming_on_other_rows(waiting: Path) -> None:
    rows = waiting.with_name("train.jsonl")
    write_jsonl(rows, problems(48, seed=9))
    message = refused(waiting, ConfigError, "sun", "--resume", left=1)
    assert "started differently" in message


def test_resuming_what_never_began(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder)
    message = refused(config, OutputError, "sun", "--resume")
    assert f"--resume: there is no interrupted run in {tmp_path / 'out' / 'module.run'}" in message


def test_a_folder_in_the_way_of_the_checkpoints_is_left_alone(waiting: Path) -> None:
    before = sorted(waiting.parent.rglob("*"))
    message = refused(waiting, OutputError, left=1)
    assert f"an interrupted run lies in {waiting.parent / 'out' / 'module.run'}" in message
    assert "Go on with it by --resume, or remove it yourself" in message
    assert sorted(waiting.parent.rglob("*")) == before


def test_tests_whose_responses_would_leave_the_context(tmp_path: Path, tiny_folder: Path) -> None:
    message = refused(with_task(tmp_path, tiny_folder, max_new_tokens=CONTEXT - 4), DataError)
    assert f"max_new_tokens {CONTEXT - 4} is more than these tests leave" in message
    assert "tests: 4 prompts" in message


def test_a_lora_target_that_the_model_has_not(tmp_path: Path, tiny_folder: Path) -> None:
    targets = ["q_prj", "k_proj"]
    config = write_run(tmp_path, tiny_folder, tune__module="lora", tune__lora={"targets": targets})
    message = refused(config, ConfigError)
    assert "the model has no layer q_prj; it has down_proj, gate_proj, k_proj" in message
