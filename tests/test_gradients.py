"""Gradients: what the prefill module learns from, and with which weights it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qsun.config import LoraConfig, TuneConfig
from qsun.decode_checkpoint import load_dequantized
from qsun.handoff import Batch, Boundary, collate, log_likelihood, response_logits, single_logits
from qsun.models import load_model
from qsun.tune.batches import Row, model_inputs
from qsun.tune.modules import TunedModules, trainable
from qsun.tune.precision import as_served, compute_in
from tests.reference import SHAPES, random_rows, tiny, with_adapter

BOUNDARIES = list(Boundary)
LAST_LAYER = "model.layers.1"


def batch() -> Batch:
    return collate(*random_rows((2, 40, 17, 128), (5, 1, 12, 7)))


def loss_of(
    prefill: Any, decode: Any, boundary: Boundary = Boundary.BEFORE_LAST, rows: Batch | None = None
) -> torch.Tensor:
    """Mean negative log-likelihood of a response token."""
    rows = rows or batch()
    return -log_likelihood(prefill, decode, rows, boundary).sum() / len(rows.targets)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


def without_gradient(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters()} - gradients(model).keys()


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_decode_module_gets_no_gradient(name: str, boundary: Boundary) -> None:
    prefill, decode = tiny(name, seed=1), tiny(name).requires_grad_(False)
    before = copy.deepcopy(decode.state_dict())
    torch.autograd.backward(loss_of(prefill, decode, boundary))
    assert gradients(decode) == {}
    assert all(torch.equal(before[name], weight) for name, weight in decode.state_dict().items())
    assert all(gradient.abs().max() > 0 for gradient in gradients(prefill).values())


def unread(name: str) -> set[str]:
    """What of an untied prefill module has no way to the K and V that are handed on."""
    attention = ["q_proj", "o_proj"] + (["q_norm"] if name == "qwen3" else [])
    return {
        "model.norm.weight",
        "lm_head.weight",
        f"{LAST_LAYER}.post_attention_layernorm.weight",
        *(f"{LAST_LAYER}.self_attn.{part}.weight" for part in attention),
        *(f"{LAST_LAYER}.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_reach_the_prefill_module_through_k_and_v_alone(name: str) -> None:
    prefill, decode = (tiny(name, seed=seed, tied=False) for seed in (1, 0))
    torch.autograd.backward(loss_of(prefill, decode.requires_grad_(False)))
    assert without_gradient(prefill) == unread(name)


@pytest.mark.parametrize("name", SHAPES)
def test_at_boundary_n_its_own_first_token_teaches_the_rest(name: str) -> None:
    prefill, decode = (tiny(name, seed=seed, tied=False) for seed in (1, 0))
    torch.autograd.backward(loss_of(prefill, decode.requires_grad_(False), Boundary.LAST))
    assert without_gradient(prefill) == set()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients_pass_a_quantized_decode_module(
    tiny_folder: Path, tiny_module: Path, boundary: Boundary
) -> None:
    prefill = load_model(tiny_folder, "bfloat16").float().requires_grad_(True)
    compute_in(prefill, torch.bfloat16)
    decode = load_dequantized(tiny_module)
    loss = loss_of(prefill, decode, boundary)
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert gradients(decode) == {}
    found = gradients(prefill)
    assert len(found) > 10
    for gradient in found.values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_the_losss_slope(name: str, boundary: Boundary) -> None:
    prefill, decode = tiny(name, seed=1), tiny(name).requires_grad_(False)
    torch.autograd.backward(loss_of(prefill, decode, boundary))
    found = gradients(prefill)
    weights = {name: prefill.get_parameter(name) for name in found}
    length = torch.stack([gradient.square().sum() for gradient in found.values()]).sum().sqrt()
    step = 0.005  # along the gradient: short beside the loss's bends, long beside rounding

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for name, gradient in found.items():
                weights[name] += distance * gradient / length
            value = float(loss_of(prefill, decode, boundary))
            for name, gradient in found.items():
                weights[name] -= distance * gradient / length
        return value

    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert slope == pytest.approx(float(length), rel=1e-2)


def single_loss(model: Any) -> torch.Tensor:
    rows = batch()
    return torch.nn.functional.cross_entropy(single_logits(model, rows), rows.targets)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_both_modules_gradients_make_up_the_single_models(name: str, boundary: Boundary) -> None:
    single = tiny(name)
    prefill, decode = copy.deepcopy(single), copy.deepcopy(single)
    torch.autograd.backward(single_loss(single))
    torch.autograd.backward(loss_of(prefill, decode, boundary))
    parts = [gradients(prefill), gradients(decode)]
    assert parts[0].keys() | parts[1].keys() == gradients(single).keys()
    for weight, whole in gradients(single).items():
        total = sum(part.get(weight, torch.zeros(())) for part in parts)
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(total, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert all(parts[0][key].abs().max() > 0 for key in parts[0].keys() & parts[1].keys())


def dense(seed: int) -> Any:
    return tiny("llama-gqa", seed=seed)


def adapted(seed: int) -> Any:
    return with_adapter(tiny("llama-gqa", seed=seed).requires_grad_(False))


def computed(
    make: Callable[[int], Any], dtype: torch.dtype, boundary: Boundary, recompute: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    prefill, decode = make(1), tiny("llama-gqa", dtype=dtype).requires_grad_(False)
    prefill.train()
    compute_in(prefill, dtype, gradient_checkpointing=recompute)
    if recompute:
        compute_in(decode, dtype, gradient_checkpointing=True)
    loss = loss_of(prefill, decode, boundary)
    torch.autograd.backward(loss)
    return loss, gradients(prefill)


@pytest.mark.parametrize("make", [dense, adapted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_recomputing_activations_changes_no_bit(
    make: Callable[[int], Any],
    dtype: torch.dtype,
    boundary: Boundary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    loss, found = computed(make, dtype, boundary, recompute=False)
    without = len(calls)
    again, found_again = computed(make, dtype, boundary, recompute=True)
    assert without == 2 * 2  # layers of two modules
    assert len(calls) - without > without  # what is counted is done a second time
    assert torch.equal(loss, again)
    assert found.keys() == found_again.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, found_again[name]), name


def test_full_fine_tuning_may_recompute_too() -> None:
    single, again = tiny("llama-gqa"), tiny("llama-gqa")
    compute_in(again, torch.float32, gradient_checkpointing=True)
    for model in (single, again):
        torch.autograd.backward(single_loss(model))
    for name, gradient in gradients(single).items():
        assert torch.equal(gradient, gradients(again)[name]), name


def written(model: Any, folder: Path) -> Any:
    """The module that the model becomes on disk in bfloat16, loaded again.

    `model.to(torch.bfloat16)` would not do: it rounds the rotary frequencies too.
    """
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    if not isinstance(model, PeftModel):
        rounded.save_pretrained(folder)
        return load_model(folder, "bfloat16")
    rounded.save_pretrained(folder / "adapter")
    rounded.unload().save_pretrained(folder / "base")
    return PeftModel.from_pretrained(
        load_model(folder / "base", "bfloat16"), folder / "adapter", autocast_adapter_dtype=False
    )


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("make", [dense, adapted])
def test_what_is_trained_computes_with_rounded_weights(
    make: Callable[[int], Any], boundary: Boundary, tmp_path: Path
) -> None:
    """Bit for bit what the module will compute once it is written in bfloat16."""
    kept, decode = make(1), tiny("llama-gqa", dtype=torch.bfloat16)
    served = written(kept, tmp_path)
    compute_in(kept, torch.bfloat16)
    with torch.no_grad():
        found = response_logits(kept, decode, batch(), boundary)
        assert torch.equal(found, response_logits(served, decode, batch(), boundary))
        alone = single_logits(kept, batch())
        assert torch.equal(alone, single_logits(served, batch()))
    assert {weight.dtype for weight in kept.parameters()} == {torch.float32}


def forwards(model: Any) -> dict[str, Any]:
    """Every forward that was put in place of its class's."""
    return {
        name: module.__dict__["forward"]
        for name, module in model.named_modules()
        if "forward" in module.__dict__
    }


@pytest.mark.parametrize("make", [dense, adapted])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_as_served_gives_everything_back(
    make: Callable[[int], Any], training: bool, error: type[BaseException] | None
) -> None:
    model = make(1)
    compute_in(model, torch.bfloat16, gradient_checkpointing=True)
    model.train(training)
    replaced = forwards(model)
    weights = {name: weight.data for name, weight in model.named_parameters()}
    values = copy.deepcopy(weights)
    assert len(replaced) == 2 + 3  # layers; embeddings, final norm, head

    def serve() -> None:
        with as_served(torch.bfloat16, model):
            assert forwards(model) == {}
            assert not any(module.training for module in model.modules())
            assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
            if error is not None:
                raise error

    if error is None:
        serve()
    else:
        with pytest.raises(error):
            serve()
    assert forwards(model) == replaced
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    for name, weight in model.named_parameters():
        assert weight.data_ptr() == weights[name].data_ptr()  # what the optimizer works on
        assert torch.equal(weight, values[name])


@pytest.mark.parametrize("make", [dense, adapted])
def test_as_served_leaves_the_hooks_by_which_processes_share_gradients(
    make: Callable[[int], Any],
) -> None:
    """torch's DistributedDataParallel hangs them on each weight's gradient accumulator, once."""
    model = make(1)
    compute_in(model, torch.bfloat16)
    called = []
    accumulators = []  # held, as DistributedDataParallel does: else they go, with their hooks
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            accumulators += [weight.expand_as(weight).grad_fn.next_functions[0][0]]
            accumulators[-1].register_hook(lambda *_, name=name: called.append(name))
    with as_served(torch.bfloat16, model):
        pass
    torch.autograd.backward(single_loss(model))
    assert sorted(called) == sorted(gradients(model))
    assert called


@pytest.mark.parametrize("make", [dense, adapted])
def test_as_served_computes_with_rounded_weights(
    make: Callable[[int], Any], tmp_path: Path
) -> None:
    model = make(1)
    served = written(model, tmp_path)
    compute_in(model, torch.bfloat16)
    decode = tiny("llama-gqa", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = response_logits(served, decode, batch())
        with as_served(torch.bfloat16, model):
            assert torch.equal(response_logits(model, decode, batch()), wanted)


@pytest.mark.parametrize("boundary", ["n-1", "n"])
def test_the_training_forward_is_the_handoffs_likelihood(boundary: str) -> None:
    prefill, decode = tiny("llama-gqa", seed=1), tiny("llama-gqa").requires_grad_(False)
    rows = [Row(*row) for row in zip(*random_rows((2, 40, 17), (5, 1, 12)), strict=True)]
    modules = TunedModules(prefill, decode, None, TuneConfig(boundary=boundary))
    assert {name for name, _ in modules.named_parameters()} == {
        f"prefill.{name}" for name, _ in prefill.named_parameters()
    }
    with torch.no_grad():
        mean = modules(**model_inputs(rows))["loss"]
        share = modules(**model_inputs(rows), num_items_in_batch=36)["loss"]
        whole = collate([row.prompt for row in rows], [row.response for row in rows])
        wanted = loss_of(prefill, decode, Boundary(boundary), whole)
    torch.testing.assert_close(mean, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(share, wanted / 2, rtol=1e-6, atol=0)  # 18 tokens


@pytest.mark.parametrize("kept", [True, False])
def test_gradients_that_graphs_write_to_stay_where_they_are(kept: bool) -> None:
    modules = TunedModules(tiny("llama-gqa"), None, None, TuneConfig())
    modules.keep_gradients = kept
    weights = list(modules.parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    addresses = [weight.grad.data_ptr() for weight in weights if weight.grad is not None]
    modules.zero_grad()
    left = [weight.grad for weight in weights if weight.grad is not None]
    assert [one.data_ptr() for one in left] == (addresses if kept else [])
    assert not any(one.any() for one in left)


def test_losses_by_their_formulas() -> None:
    prefill, decode, teacher = (tiny("llama-gqa", seed=seed) for seed in (1, 0, 2))
    rows = [Row(*row) for row in zip(*random_rows((2, 40, 17), (5, 1, 12)), strict=True)]
    whole = collate([row.prompt for row in rows], [row.response for row in rows])
    with torch.no_grad():
        found = response_logits(prefill, decode, whole).log_softmax(-1)
        wanted = single_logits(teacher, whole).log_softmax(-1)
        nll = -found.gather(1, whole.targets[:, None]).mean()
        divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
        for settings, value in (
            (TuneConfig(loss="kl"), divergence),
            (TuneConfig(loss="mix", kl_weight=0.25), 0.25 * divergence + 0.75 * nll),
        ):
            loss = TunedModules(prefill, decode, teacher, settings)(**model_inputs(rows))["loss"]
            torch.testing.assert_close(loss, value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_adapters_dropout_is_for_training_alone(recompute: bool) -> None:
    settings = TuneConfig(module="lora", lora=LoraConfig(rank=4, dropout=0.5))
    prefill, decode = trainable(tiny("llama-gqa", seed=1), settings), tiny("llama-gqa")
    for name, weight in prefill.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    compute_in(prefill, torch.float32, gradient_checkpointing=recompute)

    def two_losses() -> tuple[float, float]:
        with torch.no_grad():
            return float(loss_of(prefill, decode)), float(loss_of(prefill, decode))

    prefill.train()
    first, second = two_losses()
    assert first != second
    with as_served(torch.float32, prefill):
        first, second = two_losses()
    assert first == second
