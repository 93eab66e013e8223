"""The numeric level: what equals the base model alone may still write another cache."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsun.bundle import Manifest, PrefillModule, read_bundle
from qsun.config import VerifyConfig
from qsun.models import load_model
from qsun.references import Reference, write_references
from qsun.verdict import Check, Outcome
from qsun.verify.numeric.level import numeric_checks
from qsun.verify.numeric.plots import write_plots
from qsun.verify.subject import Subject
from tests.builders import tiny_model
from tests.bundles import SHAPES, Format, Module, Shape, build_bundle, write_decode

ROOT = Path(__file__).parent.parent
SHORT = VerifyConfig(drift_tokens=256)
Weights = dict[str, torch.Tensor]


def numeric(
    bundle: Path, base: Path | None = None, settings: VerifyConfig = SHORT
) -> dict[str, Check]:
    """All numeric checks of a tiny bundle; its random modules were tuned for nothing."""
    subject = Subject.from_bundle(read_bundle(bundle))
    assert subject.manifest is not None
    stock = tuple(replace(module, system=None) for module in subject.manifest.prefill)
    subject = replace(subject, manifest=replace(subject.manifest, prefill=stock))
    draw = random.Random(0)
    references = {}
    for task in subject.prefill:
        rows = [
            Reference(draw.choices(range(200), k=length), draw.choices(range(200), k=20))
            for length in (2, 17, 60)
        ]
        references[task] = bundle.parent / f"{bundle.name}-{task}.jsonl"
        write_references(references[task], rows)
    checks = numeric_checks(subject, base or bundle / "base", references, settings)
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.outcome is not Outcome.PASSED]


GOOD: tuple[tuple[Shape, bool, Format, Module], ...] = (
    ("llama-gqa", True, "compressed-tensors", "lora"),
    ("llama-gqa", False, "awq", "full"),
    ("llama-mha", True, "awq", "lora"),
    ("llama-mha", False, "compressed-tensors", "full"),
    ("qwen3", True, "compressed-tensors", "full"),
    ("qwen3", False, "awq", "lora"),
)


@pytest.mark.parametrize(("shape", "tied", "format_", "module"), GOOD)
def test_good_bundles_raise_no_alarm(
    tmp_path: Path, shape: Shape, tied: bool, format_: Format, module: Module
) -> None:
    bundle = build_bundle(tmp_path / "b", shape=shape, tied=tied, format=format_, module=module)
    architecture, kv_heads = SHAPES[shape]
    tiny_model(tmp_path / "base", architecture, kv_heads=kv_heads, tied=tied)
    checks = numeric(bundle, tmp_path / "base")
    assert not failed(checks), [checks[name] for name in failed(checks)]
    assert {"numeric.scales", "numeric.cache", "numeric.length.math"} <= checks.keys()
    pictures = write_plots(checks.values(), tmp_path / "plots")
    assert {path.name for path in pictures} == {
        f"{name}.{suffix}"
        for name in ("cache", "length-math", "length-code")
        for suffix in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in pictures)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("good") / "bundle")


def heads(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    return weight.reshape(-1, head_dim, weight.shape[1])


def swap_kv_heads(weights: Weights, layer: str, head_dim: int, groups: int) -> None:
    """Another order of KV heads, with their queries and outputs: the same model by itself."""
    for name in ("k_proj", "v_proj"):
        key = f"{layer}.{name}.weight"
        weights[key] = heads(weights[key], head_dim).flip(0).flatten(0, 1).contiguous()
    key = f"{layer}.q_proj.weight"
    by_group = weights[key].reshape(-1, groups * head_dim, weights[key].shape[1])
    weights[key] = by_group.flip(0).flatten(0, 1).contiguous()
    key = f"{layer}.o_proj.weight"
    by_group = weights[key].T.reshape(-1, groups * head_dim, weights[key].shape[0])
    weights[key] = by_group.flip(0).flatten(0, 1).T.contiguous()


def rescale_values(weights: Weights, layer: str, head_dim: int, groups: int) -> None:
    """V twice as large, taken back by o_proj."""
    weights[f"{layer}.v_proj.weight"] *= 2
    weights[f"{layer}.o_proj.weight"] /= 2


def rotate_values(weights: Weights, layer: str, head_dim: int, groups: int) -> None:
    """A rotation folded into V and out of it again: here a cyclic shift, exact in any dtype."""
    key = f"{layer}.v_proj.weight"
    weights[key] = heads(weights[key], head_dim).roll(1, dims=1).flatten(0, 1).contiguous()
    key = f"{layer}.o_proj.weight"
    rolled = heads(weights[key].T, head_dim).roll(1, dims=1)
    weights[key] = rolled.flatten(0, 1).T.contiguous()


def smooth_keys(weights: Weights, layer: str, head_dim: int, groups: int) -> None:
    """K's channels scaled in the pairs that rotary embedding turns together; Q's the other way."""
    scale = torch.ones(head_dim // 2)
    scale[::2] = 4.0
    scale = torch.cat([scale, scale])[None, :, None]
    for name, factor in (("k_proj", 1 / scale), ("q_proj", scale)):
        key = f"{layer}.{name}.weight"
        scaled = heads(weights[key].float(), head_dim) * factor
        weights[key] = scaled.flatten(0, 1).to(weights[key].dtype).contiguous()


Change = Callable[[Weights, str, int, int], None]


@pytest.mark.parametrize("change", [swap_kv_heads, rescale_values, rotate_values, smooth_keys])
def test_an_equal_model_with_another_cache_is_caught(
    bundle: Path, tmp_path: Path, change: Change
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle / "base", other)
    weights = load_file(other / "model.safetensors")
    model = load_model(bundle / "base", "bfloat16")
    head_dim = model.config.head_dim
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for index in range(model.config.num_hidden_layers):
        change(weights, f"model.layers.{index}.self_attn", head_dim, groups)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        alone, changed = (
            load_model(folder, "float32")(tokens).logits for folder in (bundle / "base", other)
        )
    assert (alone - changed).norm() < 1e-3 * alone.norm()

    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    shutil.rmtree(damaged / "decode")
    write_decode(other, damaged / "decode", "compressed-tensors")
    checks = numeric(damaged)
    assert checks["numeric.cache"].outcome is Outcome.FAILED
    assert "they mean something else" in checks["numeric.cache"].message


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_dead_group_is_caught(bundle: Path, tmp_path: Path, scale: float) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    path = damaged / "decode" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight_scale"][3, 1] = scale
    save_file(weights, path, {"format": "pt"})
    check = numeric(damaged)["numeric.scales"]
    assert check.outcome is Outcome.FAILED
    assert "model.layers.0.mlp.up_proj: 1 of" in check.message


def test_predictions_that_are_others_behind_the_same_cache_are_caught(
    bundle: Path, tmp_path: Path
) -> None:
    """The last layer's MLP writes no K or V any more: only what D predicts is another."""
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    path = damaged / "decode" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight_scale"] *= 8
    save_file(weights, path, {"format": "pt"})
    checks = numeric(damaged, settings=replace(SHORT, drift_tokens=0))
    assert failed(checks) == ["numeric.hand_off.math", "numeric.hand_off.code"]
    assert "nats is allowed" in checks["numeric.hand_off.math"].message


def test_an_error_that_grows_along_the_output_is_caught(bundle: Path) -> None:
    checks = numeric(bundle, settings=replace(SHORT, max_growth=0.01))
    assert failed(checks) == ["numeric.length.math", "numeric.length.code"]
    assert "at most 0.01 is allowed" in checks["numeric.length.math"].message


def math_checks(base: Path, module: Path, reference_loss: float, folder: Path) -> Check:
    """The check of `module` as math's, with the full-precision decoder."""
    from qsun.models import load_tokenizer
    from qsun.tasks.definition import load_task
    from qsun.tasks.examples import read_validation
    from qsun.tune.batches import encode_examples

    definition = ROOT / "calib" / "tasks" / "math.yaml"
    task = load_task(definition)
    examples = read_validation(task, definition.parent)[:4]
    rows = encode_examples(examples, load_tokenizer(base), task.max_tokens, "rows").rows
    path = folder / "math.jsonl"
    write_references(path, [Reference(row.prompt, row.response) for row in rows])
    entry = PrefillModule("math", "m", "lora", "sun", "n-1", 8, reference_loss, 1.6)
    manifest = Manifest(
        *("x", {}, None, "d", "full precision", "t", "n-1", {}, "auto", 512, (entry,), (), {})
    )
    subject = Subject(base, base, {"math": module}, base, "n-1", manifest, None, None)
    checks = numeric_checks(subject, base, {"math": path}, VerifyConfig(drift_tokens=0))
    found = {check.name: check for check in checks}
    assert found["numeric.cache"].outcome is Outcome.PASSED
    assert "numeric.scales" not in found
    return found["numeric.prefill.math"]


def test_a_tasks_module_is_told_from_anothers(smollm2_base: Path, tmp_path: Path) -> None:
    reference = ROOT / "exports" / "reference"
    own = math_checks(smollm2_base, reference / "math", 0.1, tmp_path)
    assert own.values is not None
    loss = own.values["loss"]
    assert loss < 0.1 * own.values["base_loss"]
    assert math_checks(smollm2_base, reference / "math", loss, tmp_path).outcome is Outcome.PASSED
    for other in ("tools", "math-full-ft"):
        check = math_checks(smollm2_base, reference / other, loss, tmp_path)
        assert check.outcome is Outcome.FAILED
        assert "when it was exported" in check.message


def test_a_module_that_helps_nothing_is_caught(smollm2_base: Path, tmp_path: Path) -> None:
    """The base model under a task's name, with the loss that it really has."""
    loss = 1.0
    for _ in range(2):
        check = math_checks(smollm2_base, smollm2_base, loss, tmp_path)
        assert check.values is not None
        loss = check.values["loss"]
    assert check.outcome is Outcome.FAILED
    assert "no better than" in check.message
