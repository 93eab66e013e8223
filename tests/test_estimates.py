"""Dry runs: formulas against small shapes by hand and public sizes; the big configs, no weights."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qsun.checkpoint_files import read_config_file
from qsun.config import LoraConfig, TuneConfig, load_config
from qsun.evaluate import estimate as evaluation
from qsun.evaluate.estimate import Asked
from qsun.evaluate.systems import System
from qsun.quantize.estimate import BlockTimes
from qsun.records import read_record
from qsun.skeleton import LinearShape, Skeleton, skeleton
from qsun.tune import estimate as tuning
from qsun.tune.estimate import Rows, Sizes
from tests.command import run_qsun
from tests.tuning import write_run

ROOT = Path(__file__).parent.parent
CONFIGS, RECORDS = ROOT / "configs", ROOT / "docs" / "records"
# Parameters as the models' cards give them.
PUBLIC = {
    "llama-3.1-8b": 8.03e9,
    "qwen3-1.7b-base": 1.72e9,
    "qwen3-8b-base": 8.19e9,
    "qwen3-14b-base": 14.77e9,
}
TIMED = "qwen3-1.7b-base"  # the others' blocks take up to 24 s to time
SMALL = Sizes(
    parameters=1000, blocks=600, head=100, unread=150, adapters=20, layers=2, hidden=4,
    intermediate=8, queries=4, keys=2, vocabulary=50,
)  # fmt: skip
ROWS = Rows(count=256, prompt_tokens=3.0, response_tokens=5.0, max_tokens=10, told="")
# The shape of SmolLM2-135M-Instruct, which the records are of: its GGUF takes seconds to open.
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def config_of(name: str) -> dict[str, Any]:
    return read_config_file(CONFIGS / "models" / name / "config.json")


@pytest.mark.parametrize(("name", "parameters"), PUBLIC.items())
def test_the_shipped_shapes_have_the_models_parameters(name: str, parameters: float) -> None:
    assert skeleton(config_of(name)).parameters == pytest.approx(parameters, rel=0.003)


def test_a_rows_flops_by_hand() -> None:
    # Attention: 12 FLOPs for each of 4 wide, 2 layers and 8 * 8 / 2 pairs.
    attention = 12 * 4 * 2 * 32
    plain = TuneConfig()
    sun = 6 * 600 * 3 + 4 * 600 * 5 + 4 * 100 * 5 + attention
    full_ft = 6 * 600 * 8 + 6 * 100 * 5 + attention
    assert tuning.row_flops(SMALL, ROWS, plain, "sun") == sun
    assert tuning.row_flops(SMALL, ROWS, plain, "qsun") == sun
    assert tuning.row_flops(SMALL, ROWS, plain, "full-ft") == full_ft
    again = 2 * 600 * 8 + 4 * 4 * 2 * 32  # the way there once more, of layers and attention
    checkpointing = TuneConfig(gradient_checkpointing=True)
    assert tuning.row_flops(SMALL, ROWS, checkpointing, "sun") == sun + again
    assert tuning.row_flops(SMALL, ROWS, checkpointing, "full-ft") == full_ft + again
    lora = sun - 2 * 600 * 3 + 6 * 20 * 3
    assert tuning.row_flops(SMALL, ROWS, TuneConfig(module="lora"), "sun") == lora
    teacher = 2 * 600 * 8 + 2 * 100 * 5 + 4 * 4 * 2 * 32
    assert tuning.row_flops(SMALL, ROWS, TuneConfig(loss="kl"), "sun") == sun + teacher


def test_a_gpus_memory_by_hand() -> None:
    found = tuning.memory_parts(SMALL, ROWS, TuneConfig(micro_batch_size=2), "sun")
    kept = 10 * 4 + 8 * 8 + 4 * (4 + 2)  # of one layer and token
    assert found == {
        "frozen modules": 2 * 1000,
        "prefill module": 4 * 1000,
        "its weights as computed with": 2 * 600,
        "one more gradient of the embeddings": 4 * 100,
        "gradients": 4 * (1000 - 150),
        "AdamW's moments": 8 * (1000 - 150),
        "activations": 2 * 10 * 2 * kept,
        "logits": int(6 * 2 * 10 * 5 / 8 * 50),
        "CUDA": tuning.LIBRARY_BYTES,
    }
    checkpointing = TuneConfig(micro_batch_size=2, gradient_checkpointing=True)
    found = tuning.memory_parts(SMALL, ROWS, checkpointing, "qsun")
    assert found["frozen modules"] == 2 * 2 * 1000
    assert found["its weights as computed with"] == 2 * 300
    assert found["activations"] == 2 * 10 * (2 * 2 * (4 + 2 * 2) + kept)
    found = tuning.memory_parts(SMALL, ROWS, TuneConfig(), "full-ft")
    assert (found["gradients"], found["AdamW's moments"]) == (4 * 1000, 8 * 1000)
    found = tuning.memory_parts(SMALL, ROWS, TuneConfig(module="lora"), "sun")
    assert found["prefill module"] == 2 * 1000 + 4 * 20
    assert (found["gradients"], found["AdamW's moments"]) == (4 * 20, 8 * 20)


def test_what_gets_no_gradient_is_what_feeds_no_cache() -> None:
    config = config_of("llama-3.1-8b")
    sizes = tuning.sizes_of(config, skeleton(config), TuneConfig(lora=LoraConfig(rank=16)))
    last_layer = 2 * 4096 * 4096 + 3 * 4096 * 14336 + 4096  # q, o, MLP and the norm before it
    assert sizes.unread == 128256 * 4096 + 4096 + last_layer
    # Rank 16 on all linear layers of a block: 41.9 million, as peft counts it.
    assert sizes.adapters == 41_943_040
    tied = config_of("qwen3-1.7b-base")
    assert tuning.sizes_of(tied, skeleton(tied), TuneConfig()).unread < 2048 * 6144 * 4


def test_steps_disk_and_hours() -> None:
    config = config_of("qwen3-1.7b-base")
    shape = skeleton(config)
    found = tuning.estimate(config, shape, ROWS, TuneConfig(epochs=3, batch_size=100), "sun")
    assert found.steps == 256 * 3 // 100
    assert found.checkpoint_bytes == 12 * shape.parameters
    assert found.disk_bytes == 3 * 12 * shape.parameters + 2 * shape.parameters
    flops = found.steps * found.step_flops
    assert found.gpu_hours == pytest.approx(flops / (989e12 * 0.11) / 3600)


def test_an_evaluation_by_hand() -> None:
    config: dict[str, Any] = {
        "hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 50,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "dtype": "bfloat16",
    }  # fmt: skip
    head: dict[str, tuple[int, ...]] = {"lm_head.weight": (50, 4)}
    linears = (LinearShape("model.layers.0.mlp.up_proj", 30, 20), LinearShape("lm_head", 4, 50))
    shape = Skeleton(linears, 1000, head, frozenset())
    asked = Asked(prompts=5, prompt_tokens=6.0, new_tokens=8, told="")
    pairs = 6 * 6 / 2
    assert evaluation.prefill_flops(config, shape, asked) == 5 * (
        2 * 600 * 6 + 4 * 2 * 2 * 2 * pairs
    )
    kv = 2 * 2 * 1 * 2 * 2  # K and V, layers, heads, width, bytes
    step = 2 * (1000 - 200) + 2 * (6 + 4) * kv  # 2 rows at once, answers half grown
    assert evaluation.decode_s(config, shape, asked, 2) == pytest.approx(3 * 8 * step / 4.3e12)
    tied = Skeleton(linears, 800, head, frozenset(head))
    assert evaluation.decode_s(config, tied, asked, 2) == pytest.approx(3 * 8 * step / 4.3e12)
    two = [System("base", Path("b"), Path("b")), System("sun", Path("s"), Path("b"))]
    found = evaluation.estimate(config, shape, {"t.x": asked}, {"t.x": two}, 2)
    assert found.memory["modules"] == 2 * 2 * 1000
    assert found.memory["KV cache of a batch"] == 2 * (6 + 8) * kv
    assert found.samples_bytes == 2 * 5 * (4 * 8 + 400)
    alone = evaluation.estimate(config, shape, {"t.x": asked}, {"t.x": two[:1]}, 2)
    assert alone.memory["modules"] == 2 * 1000
    assert found.gpu_hours["t.x"] == pytest.approx(2 * alone.gpu_hours["t.x"])


def test_the_utilization_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "exports/reference/math/records/tuning.json").read_text())
    train = rows["result"]["rows"]["train"]
    prompt, response = (train[f"{one}_tokens"] / train["rows"] for one in ("prompt", "response"))
    mean = Rows(train["rows"], prompt, response, 1024, "")
    settings = TuneConfig()
    sizes = tuning.sizes_of(SMOLLM2, skeleton(SMOLLM2), settings)
    medians = read_record(RECORDS / "tuning-speed.json", "tuning-speed").result["medians"]
    for system in ("sun", "full-ft"):
        tokens_per_s = medians[f"{system}, batch 128"]["tokens_per_s"]
        flops = tuning.row_flops(sizes, mean, settings, system) / mean.tokens
        assert round(flops * tokens_per_s / tuning.PEAK_FLOPS, 2) == tuning.UTILIZATION[system]


def test_the_memory_is_near_what_was_measured() -> None:
    """Of recorded trainings whose rows fill 1,024 tokens and that generate nothing on the way."""
    shape, ratios = skeleton(SMOLLM2), []
    mean = {"code": (222.0, 158.0), "tools": (512.0, 64.0)}
    trainings = json.loads((RECORDS / "sun-comparison.json").read_text())["result"]["trainings"]
    for name, found in trainings.items():
        command, task = found["command"], name.partition("-")[0]
        if task not in mean or "tune.evaluations=0" not in command:
            continue
        micro = re.search(r"micro_batch_size=(\d+)", command)
        rank = re.search(r"lora.rank=(\d+)", command)
        assert micro is not None
        settings = TuneConfig(
            module="lora" if "tune.module=lora" in command else "full",
            lora=LoraConfig(rank=int(rank[1]) if rank else 16),
            micro_batch_size=int(micro[1]),
        )
        sizes = tuning.sizes_of(SMOLLM2, shape, settings)
        parts = tuning.memory_parts(
            sizes, Rows(1, *mean[task], 1024, ""), settings, found["system"]
        )
        ratios.append(sum(parts.values()) / 1024**3 / found["training"]["accelerator_gib"])
    assert len(ratios) > 20
    assert min(ratios) > 0.9
    assert max(ratios) < 1.3


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run asked for something over the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", PUBLIC)
def test_a_big_config_is_planned_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name != TIMED:
        blocks = "qsun.quantize.estimate_blocks"
        monkeypatch.setattr(f"{blocks}.time_one_block", lambda *_: BlockTimes(1.0, 1.0, 1.0))
        monkeypatch.setattr(f"{blocks}._search_one_block", lambda *_: 1.0)
    path = CONFIGS / f"{name}.yaml"
    for task, system in (("paper-math", "qsun"), ("paper-code", "sun"), ("paper-tools", "full-ft")):
        outcome = run_qsun("tune", path, "--task", task, "--system", system, "--dry-run")
        assert outcome.exit_code == 0, outcome.stderr
        assert f"{name}: {task} as {system}, full module" in outcome.stdout
        assert "80,000 of about 192 prompt" in outcome.stdout
        assert "count by tune.samples, lengths assumed" in outcome.stdout
        assert "an assumption for any other size" in outcome.stdout
        assert (f"{name}/decode" in outcome.stdout) == (system == "qsun")
    outcome = run_qsun("quantize", path, "--dry-run")
    assert outcome.exit_code == 0, outcome.stderr
    outcome = run_qsun("evaluate", path, "--dry-run")
    assert outcome.exit_code == 0, outcome.stderr
    for line in ("paper-code.humaneval  ", "paper-tools.multiple  ", "paper-math.gsm_plus  "):
        assert line in outcome.stdout
    assert outcome.stdout.count("not there yet") == 1 + 3 * 4
    assert "at least" in outcome.stdout
    assert [*tmp_path.iterdir()] == []


def test_without_dry_run_missing_modules_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    path = CONFIGS / "llama-3.1-8b.yaml"
    model = f"base.model={tiny_folder}"
    outcome = run_qsun("evaluate", path, "--out", tmp_path / "out", "--set", model)
    assert outcome.exit_code == 4, outcome.stderr
    assert "cannot be evaluated together" in outcome.message
    assert run_qsun("evaluate", path).exit_code == 3  # --out is still needed


def test_rows_that_lie_here_are_counted(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder)
    before = sorted(tmp_path.rglob("*"))
    outcome = run_qsun("tune", config, "--task", "task", "--dry-run", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert found["rows"]["count"] == 40
    assert found["rows"]["told"].startswith("rows counted")
    assert found["estimate"]["steps"] == 3 * 40 // 8
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path, tiny_folder: Path) -> None:
    config = write_run(tmp_path, tiny_folder, tune__batch_size=9)
    outcome = run_qsun("tune", config, "--task", "task", "--dry-run")
    assert (outcome.exit_code, outcome.stdout) == (3, "")
    assert "no multiple of 4" in outcome.message


def test_lm_evals_test_set_does_not_take_the_place_of_a_tasks_own() -> None:
    changed = "evaluate.modules=[{task: paper-code, sun: ../none, lm_eval: [humaneval]}]"
    path = CONFIGS / "qwen3-1.7b-base.yaml"
    outcome = run_qsun("evaluate", path, "--dry-run", "--set", changed)
    assert outcome.exit_code == 3, outcome.stderr
    assert "a task's own test set: paper-code.humaneval" in outcome.message


def test_the_big_configs_say_the_papers_recipe() -> None:
    for name in PUBLIC:
        run = load_config(CONFIGS / f"{name}.yaml")
        tune = run.tune
        assert (tune.batch_size, tune.epochs, tune.learning_rate, tune.warmup) == (
            128,
            1,
            2e-5,
            0.1,
        )
        assert run.base.config == f"models/{name}/config.json"
        assert [Path(task).stem for task in run.tasks] == [
            "paper-math",
            "paper-code",
            "paper-tools",
        ]


@pytest.mark.usefixtures("no_network")
def test_the_tables_of_the_docs_are_the_dry_runs() -> None:
    spec = importlib.util.spec_from_file_location("estimates", ROOT / "docs/estimates_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert script.tuning_table() in text
    assert script.other_table() in text
