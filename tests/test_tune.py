"""Tuning end to end on tiny models: what is trained, written, kept, and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.training_args import ParallelMode

from qsun.decode_checkpoint import load_dequantized, weights_digest
from qsun.errors import Interrupted
from qsun.files import digest_folder
from qsun.handoff import Boundary, log_likelihood, single_logits
from qsun.models import load_model, load_tokenizer
from qsun.records import read_record
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_task
from qsun.tune.batches import MicroBatches, Row, batch_of, encode_examples
from qsun.tune.load import trained_modules
from tests.builders import tensors_on_disk, tiny_model
from tests.tuning import log_lines, tune, tuned, write_run

REPOSITORY = Path(__file__).parent.parent
MAIN = "from qsun.cli.main import main\nmain()\n"
LORA = {
    "tune__module": "lora",
    "tune__lora": {"rank": 4, "alpha": 8.0},
    "tune__learning_rate": 0.02,
}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny_model(folder, seed=5)
    return folder


def validation_rows(config: Path, model: Path) -> list[Row]:
    path = config.parent / "task.yaml"
    task = load_task(path)
    examples = read_task(task, path.parent).validation
    return encode_examples(examples, load_tokenizer(model), task.max_tokens, "validation").rows


def loss(prefill: Any, decode: Any, rows: list[Row], boundary: Boundary) -> float:
    """Of a response token, over all rows in one batch."""
    batch = batch_of(rows)
    with torch.no_grad():
        return -float(log_likelihood(prefill, decode, batch, boundary).sum()) / len(batch.targets)


def single_loss(model: Any, rows: list[Row]) -> float:
    batch = batch_of(rows)
    with torch.no_grad():
        logits = single_logits(model, batch).float()
    return float(torch.nn.functional.cross_entropy(logits, batch.targets))


def close(value: float) -> Any:
    """bfloat16 in batches of other sizes: sums in another order."""
    return pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize("boundary", ["n-1", "n"])
@pytest.mark.parametrize("module", ["full", "lora"])
def test_sun_tunes_a_prefill_module(
    tmp_path: Path, tiny_folder: Path, module: str, boundary: str
) -> None:
    before = digest_folder(tiny_folder)
    changes = LORA if module == "lora" else {}
    config = write_run(tmp_path, tiny_folder, **changes, tune__boundary=boundary)
    result = tuned(config)
    assert digest_folder(tiny_folder) == before
    rows = validation_rows(config, tiny_folder)
    base = load_model(tiny_folder, "bfloat16")
    where = Boundary(boundary)
    losses = result["validation_loss"]
    assert losses["base"] == close(loss(base, base, rows, where))  # the decode module is as it was
    assert losses["sun"] < losses["base"] - 0.3
    out = tmp_path / "out" / "module"
    if module == "full":
        prefill = load_model(out, "bfloat16")
        assert result["trained_weights"] == sum(weight.numel() for weight in base.parameters())
    else:
        prefill = PeftModel.from_pretrained(
            load_model(tiny_folder, "bfloat16"), out, autocast_adapter_dtype=False
        )
        assert {path.name for path in out.glob("*.safetensors")} == {"adapter_model.safetensors"}
        adapter = json.loads((out / "adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"]) == (4, 8.0)
        assert adapter["base_model_name_or_path"] == str(tiny_folder)
    # What was written is what was measured, in the dtype that is served.
    assert losses["sun"] == close(loss(prefill, load_model(tiny_folder, "bfloat16"), rows, where))
    assert {tensor.dtype for _, tensor in tensors_on_disk(out)} == {torch.bfloat16}


def test_a_tuned_module_is_published_with_its_record_and_logs(
    tmp_path: Path, tiny_folder: Path
) -> None:
    config = write_run(tmp_path, tiny_folder)
    outcome = tune(config)
    assert outcome.exit_code == 0, outcome.stderr
    out = tmp_path / "out" / "module"
    assert sorted(path.name for path in out.parent.iterdir()) == ["module"]  # no OUT.run either
    assert f"task, system sun, full module, boundary n-1: {out}" in outcome.stdout

    record = read_record(out / "records" / "tuning.json", "tuning")
    result = record.result
    assert {"system": "sun", "module": "full", "boundary": "n-1"}.items() <= result.items()
    assert result["task"]["train"] == 40
    assert result["task"]["validation"] == 8
    assert result["task"]["tests"] == {"tests": 4}
    assert result["rows"]["train"]["rows"] == 40
    training = result["training"]
    assert (training["steps"], training["processes"]) == (15, 1)
    rows = result["rows"]["train"]
    assert training["tokens"] == 3 * (rows["prompt_tokens"] + rows["response_tokens"])
    assert 0 <= training["padding_share"] < 1
    assert [line["step"] for line in result["evaluations"]] == [0, 8, 15]
    assert set(result["tests"]) == {"base", "sun"}
    for tests in result["tests"].values():
        assert tests["tests"]["total"] == 4
        assert len(tests["tests"]["responses"]) == 3
    assert set(result["validation_loss"]) == {"base", "sun"}
    assert result["evaluations"][-1]["eval_loss"] == close(result["validation_loss"]["sun"])
    assert result["base"]["model"] == str(tiny_folder)
    on_disk = digest_folder(out)
    assert on_disk.pop("records/tuning.json")
    assert result["files"] == on_disk

    lines = log_lines(out / "logs")
    assert 10 in [line["step"] for line in lines if "loss" in line]
    falling = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= line["eval_accuracy"] <= 1 for line in lines if "eval_loss" in line)
    assert lines[-1]["epoch"] == 3
    assert list((out / "logs" / "tensorboard").glob("events*"))
    assert load_tokenizer(out).chat_template == load_tokenizer(tiny_folder).chat_template
    AutoModelForCausalLM.from_pretrained(out)


def test_qsun_tunes_through_the_quantized_module(
    tmp_path: Path, tiny_folder: Path, tiny_module: Path
) -> None:
    before = digest_folder(tiny_module)
    config = write_run(tmp_path, tiny_folder, tune__decode=str(tiny_module))
    result = tuned(config, "qsun")
    assert digest_folder(tiny_module) == before
    assert result["decode_digest"] == weights_digest(tiny_module)
    losses = result["validation_loss"]
    assert losses["qsun"] < losses["base"] - 0.3
    rows = validation_rows(config, tiny_folder)
    prefill = load_model(tmp_path / "out" / "module", "bfloat16")
    quantized = load_dequantized(tiny_module)
    assert losses["qsun"] == close(loss(prefill, quantized, rows, Boundary.BEFORE_LAST))


def test_full_fine_tuning_is_measured_alone_and_handed_to_the_base(
    tmp_path: Path, tiny_folder: Path
) -> None:
    config = write_run(tmp_path, tiny_folder, tune__learning_rate=1e-3)
    result = tuned(config, "full-ft")
    losses = result["validation_loss"]
    assert losses["full-ft"] < losses["base"] - 1
    rows = validation_rows(config, tiny_folder)
    model = load_model(tmp_path / "out" / "module", "bfloat16")
    base = load_model(tiny_folder, "bfloat16")
    assert losses["full-ft"] == close(single_loss(model, rows))
    assert losses["naive"] == close(loss(model, base, rows, Boundary.BEFORE_LAST))
    assert set(result["tests"]) == {"base", "full-ft", "naive"}


@pytest.mark.parametrize("kind", ["kl", "mix"])
def test_a_teacher_is_learned_from(
    tmp_path: Path, tiny_folder: Path, teacher: Path, kind: str
) -> None:
    before = digest_folder(teacher)
    changes = {"tune__loss": kind, "tune__teacher": str(teacher), "tune__epochs": 6}
    tuned(write_run(tmp_path, tiny_folder, **changes))
    assert digest_folder(teacher) == before
    losses = [line["loss"] for line in log_lines(tmp_path / "out/module/logs") if "loss" in line]
    assert len(losses) >= 3
    assert losses[-1] < losses[0] - 0.1


def test_options_that_save_memory_change_no_bit(tmp_path: Path, tiny_folder: Path) -> None:
    plain = write_run(tmp_path / "plain", tiny_folder)
    saving = write_run(tmp_path / "saving", tiny_folder, tune__gradient_checkpointing=True)
    results = [tuned(config) for config in (plain, saving)]
    assert results[0]["training"]["train_loss"] == results[1]["training"]["train_loss"]
    assert weights(plain) == weights(saving)


def weights(config: Path) -> dict[str, list[float]]:
    """What was published, for comparison bit for bit."""
    out = config.parent / "out" / "module"
    return {name: tensor.flatten().tolist() for name, tensor in tensors_on_disk(out)}


def values(config: Path) -> dict[tuple[int, str], Any]:
    """Every value of a published run's log, by step and name; no times and no sums."""
    return {
        (line["step"], name): value
        for line in log_lines(config.parent / "out" / "module" / "logs")
        for name, value in line.items()
        if "train_runtime" not in line and name != "step"
    }


@pytest.fixture(scope="session")
def uninterrupted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = write_run(tmp_path_factory.mktemp("uninterrupted"), tiny_folder)
    tuned(config)
    return config


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send a signal while a step's second and last micro-batch is fetched."""
    fetch = MicroBatches.__getitem__

    def interrupted(self: MicroBatches, index: int) -> list[Row]:
        if index == 2 * step - 1:
            signal.raise_signal(number)
        return fetch(self, index)

    monkeypatch.setattr(MicroBatches, "__getitem__", interrupted)


def assert_the_same_run(config: Path, uninterrupted: Path) -> None:
    def result(of: Path) -> dict[str, Any]:
        found = read_record(of.parent / "out/module/records/tuning.json", "tuning").result
        del found["training"]["seconds"], found["files"]
        return found

    assert weights(config) == weights(uninterrupted)
    assert values(config) == values(uninterrupted)
    assert result(config) == result(uninterrupted)


@pytest.mark.parametrize(
    ("step", "number"), [(7, signal.SIGINT), (10, signal.SIGTERM), (13, signal.SIGINT)]
)
def test_an_interrupted_run_goes_on_as_if_it_never_stopped(
    tmp_path: Path, tiny_folder: Path, uninterrupted: Path, step: int, number: int
) -> None:
    config = write_run(tmp_path, tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step, number)
        outcome = tune(config)
    assert outcome.exit_code == 130
    assert "interrupted; nothing was published" in outcome.message
    assert "--resume" in outcome.message
    run = tmp_path / "out" / "module.run"
    assert sorted(path.name for path in run.parent.iterdir()) == ["module.run"]
    assert (run / f"checkpoint-{step}" / "trainer_state.json").exists()

    refused = tune(config)
    assert refused.exit_code == 7
    assert f"an interrupted run lies in {run}" in refused.message
    assert "--resume" in refused.message

    tuned(config, "sun", "--resume")
    assert not run.exists()
    assert_the_same_run(config, uninterrupted)


def test_an_adapters_run_goes_on_too(tmp_path: Path, tiny_folder: Path) -> None:
    changes = LORA | {"tune__lora": {"rank": 4, "dropout": 0.1}}
    whole, stopped = (write_run(tmp_path / name, tiny_folder, **changes) for name in "ab")
    tuned(whole)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        assert tune(stopped).exit_code == 130
    tuned(stopped, "sun", "--resume")
    assert weights(stopped) == weights(whole)


def test_a_checkpoint_that_is_half_written_is_passed_over(
    tmp_path: Path, tiny_folder: Path, uninterrupted: Path
) -> None:
    config = write_run(tmp_path, tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 8)
        assert tune(config).exit_code == 130
    run = tmp_path / "out" / "module.run"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-8"}
    (run / "checkpoint-8" / "trainer_state.json").unlink()
    tuned(config, "sun", "--resume")
    assert_the_same_run(config, uninterrupted)


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(
    tmp_path: Path, tiny_folder: Path, uninterrupted: Path
) -> None:
    config = write_run(tmp_path, tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 3)
        assert tune(config).exit_code == 130
    run = tmp_path / "out" / "module.run"
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    tuned(config, "sun", "--resume")
    assert_the_same_run(config, uninterrupted)


def test_a_run_whose_publishing_failed_only_publishes(
    tmp_path: Path, tiny_folder: Path, uninterrupted: Path
) -> None:
    config = write_run(tmp_path, tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsun.tune.run.save_prefill", fail)
        with pytest.raises(RuntimeError, match="the disk was pulled out"):
            tune(config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["module.run"]
    tuned(config, "sun", "--resume")
    assert_the_same_run(config, uninterrupted)


def fail(*_: Any) -> None:
    raise RuntimeError("the disk was pulled out")


def start(folder: Path, config: Path, *launcher: str) -> subprocess.Popen[str]:
    """`qsun tune` in processes of its own."""
    script = folder / "qsun_main.py"
    script.write_text(MAIN)
    out = config.parent / "out" / "module"
    out.parent.mkdir(exist_ok=True)
    options = ["tune", str(config), "--task", "task", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        # A test suite run in the background passes on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_during_training(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__epochs=200, tune__evaluations=100)
    process = start(tmp_path, config)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 10:" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted: saving a checkpoint after this step" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["module.run"]
    assert list((tmp_path / "out" / "module.run").glob("checkpoint-*/trainer_state.json"))


def test_a_process_trains_on_one_gpu_and_names_the_others(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*args: Any) -> Any:
        loaded = trained_modules(*args)  # on CPU; from here on, three GPUs are seen
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        for name in ("set_device", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        return loaded

    def begin(*_: Any, args: Any, **__: Any) -> None:
        asked.append((args.device, args.parallel_mode))
        AcceleratorState._reset_state(reset_partial_state=True)  # it would remember the GPU
        raise Interrupted("training begins")

    monkeypatch.setattr("qsun.tune.run.trained_modules", load)
    monkeypatch.setattr("qsun.tune.trainer.HandoffTrainer", begin)
    outcome = tune(write_run(tmp_path, tiny_folder))
    assert "training begins" in outcome.stderr
    # NOT_DISTRIBUTED would be torch.nn.DataParallel.
    assert asked == [(torch.device("cuda:0"), ParallelMode.NOT_PARALLEL)]
    assert "on one GPU of 3, the rest stay idle" in outcome.stderr
    assert "accelerate launch --num_processes 3 --no_python qsun tune" in outcome.stderr


def test_two_processes_train_what_one_does(
    tmp_path: Path, tiny_folder: Path, uninterrupted: Path
) -> None:
    config = write_run(tmp_path, tiny_folder)
    process = start(
        tmp_path, config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    )
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert stdout.count("task, system sun, full module") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["module"]
    both, one = (
        read_record(of.parent / "out/module/records/tuning.json", "tuning").result
        for of in (config, uninterrupted)
    )
    assert both["training"]["processes"] == 2
    assert both["training"]["steps"] == one["training"]["steps"]
    assert both["training"]["train_loss"] == pytest.approx(one["training"]["train_loss"], rel=2e-3)
    for name, value in one["validation_loss"].items():
        assert both["validation_loss"][name] == pytest.approx(value, rel=1e-2)
    assert both["tests"]["base"] == one["tests"]["base"]
    assert [line["step"] for line in both["evaluations"]] == [0, 8, 15]
