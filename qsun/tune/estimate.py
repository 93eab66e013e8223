"""The estimate: FLOPs, memory, disk and hours of a tuning, from shapes and settings alone.

Nothing is run. A row has p prompt and r response tokens; W are the linear weights of all decoder
layers, H those of the head, A the width of all query heads and L the layers. Hours are FLOPs over
what an H200 does in dense bfloat16 by its data sheet, at the utilization that small models reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsun.config import TuneConfig
from qsun.skeleton import Skeleton

PEAK_FLOPS = 989e12  # NVIDIA H200, dense bfloat16
# SmolLM2-135M at batch 128 on one H200, as docs/records/tuning-speed.json has it. No larger model
# was measured: these are assumptions for it.
UTILIZATION = {"sun": 0.11, "qsun": 0.11, "full-ft": 0.18}
VALUE_BYTES, FLOAT_BYTES = 2, 4  # bfloat16 and float32
MOMENT_BYTES = 2 * FLOAT_BYTES  # AdamW's two
# What a compiled layer keeps of a token for the way back, in bytes: `_kept_bytes`. The factors, and
# the bytes of a logit, fit the peaks that docs/records/sun-comparison.json holds of rows of 1,024
# tokens: tests/test_estimates.py says how closely.
KEPT_OF_HIDDEN, KEPT_OF_INTERMEDIATE, KEPT_OF_ATTENTION = 10, 8, 4
LOGIT_BYTES = 6
KEPT_CHECKPOINTS = 3  # the trainer keeps two, and writes the next one before one of them goes
LIBRARY_BYTES = 1_000_000_000  # CUDA's context and kernels


@dataclass(frozen=True)
class Rows:
    """What is trained on: rows and their mean tokens; `told` says where that is known from."""

    count: int
    prompt_tokens: float
    response_tokens: float
    max_tokens: int
    told: str

    @property
    def tokens(self) -> float:
        """Mean tokens of a row."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class Sizes:
    """A model's weights and widths. `unread` get no gradient where only K and V are handed over."""

    parameters: int
    blocks: int
    head: int
    unread: int
    adapters: int
    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int


@dataclass(frozen=True)
class TuningEstimate:
    """What a run is expected to need. `memory` is one GPU's, by what it holds."""

    steps: int
    step_flops: float
    full_ft_step_flops: float
    utilization: float
    gpu_hours: float
    memory: Mapping[str, int]
    activations_with: int
    activations_without: int
    checkpoint_bytes: int
    module_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What one GPU holds at most."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """Checkpoints and the published module."""
        return KEPT_CHECKPOINTS * self.checkpoint_bytes + self.module_bytes


def sizes_of(config: Mapping[str, Any], shape: Skeleton, settings: TuneConfig) -> Sizes:
    """The sizes of the model that `config` describes, with the adapters that are asked for."""
    blocks = [one for one in shape.linears if not one.name.startswith("lm_head")]
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    unread = [
        name
        for name in shape.tensors
        if name not in shape.tied
        and (
            name in ("lm_head.weight", "model.norm.weight")
            or (name.startswith(last) and not _feeds_the_cache(name))
        )
    ]
    adapted = [one for one in blocks if one.name.rpartition(".")[2] in settings.lora.targets]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Sizes(
        parameters=shape.parameters,
        blocks=sum(one.in_features * one.out_features for one in blocks),
        head=config["vocab_size"] * config["hidden_size"],
        unread=sum(_count(shape.tensors[name]) for name in unread),
        adapters=settings.lora.rank * sum(one.in_features + one.out_features for one in adapted),
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        queries=heads * head_dim,
        keys=(config.get("num_key_value_heads") or heads) * head_dim,
        vocabulary=config["vocab_size"],
    )


def _feeds_the_cache(name: str) -> bool:
    return any(part in name for part in ("k_proj", "v_proj", "k_norm", "input_layernorm"))


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def row_flops(sizes: Sizes, rows: Rows, settings: TuneConfig, system: str) -> float:
    """FLOPs of one row's forward and backward.

    A weight costs 2 FLOPs a token on the way there, 2 for the gradient of its input, and 2 for its
    own where it is trained. SUN: P reads p tokens at 6 W (LoRA: 4 W and 6 of the adapters), D reads
    r at 4 W and 4 H: its weights have no gradient. Full fine-tuning: p + r tokens at 6 W, r at 6 H.
    Attention: 12 A L for each of the (p + r)^2 / 2 pairs of tokens, in either. Gradient
    checkpointing adds the way there once more, without the head. A teacher adds 2 W for p + r
    tokens, 2 H for r, and 4 A L for each pair.
    """
    p, r, again = rows.prompt_tokens, rows.response_tokens, 2 * settings.gradient_checkpointing
    lora, pairs = settings.module == "lora", (p + r) ** 2 / 2
    trained = (4 + again) * sizes.blocks + (6 + again) * sizes.adapters
    if not lora:
        trained = (6 + again) * sizes.blocks
    attention = (12 + 2 * again) * sizes.queries * sizes.layers * pairs
    if system == "full-ft":
        flops = trained * (p + r) + (4 if lora else 6) * sizes.head * r + attention
    else:
        decode = (4 + again) * sizes.blocks + 4 * sizes.head
        flops = trained * p + decode * r + attention
    if settings.loss != "nll":
        flops += 2 * (sizes.blocks * (p + r) + sizes.head * r)
        flops += 4 * sizes.queries * sizes.layers * pairs
    return flops


def activation_bytes(sizes: Sizes, rows: Rows, settings: TuneConfig, checkpointing: bool) -> int:
    """What a micro-batch of the longest rows keeps for the way back, P's cache included.

    Every token keeps `_kept_bytes` a layer. With gradient checkpointing a layer keeps a token's
    hidden state, K and V, and one layer at a time all of it.
    """
    tokens = settings.micro_batch_size * rows.max_tokens
    whole = _kept_bytes(sizes)
    if not checkpointing:
        return tokens * sizes.layers * whole
    return tokens * (sizes.layers * VALUE_BYTES * (sizes.hidden + 2 * sizes.keys) + whole)


def _kept_bytes(sizes: Sizes) -> int:
    """10 bytes of the hidden width, 8 of the MLP's, 4 of the queries' and of K's."""
    return (
        KEPT_OF_HIDDEN * sizes.hidden
        + KEPT_OF_INTERMEDIATE * sizes.intermediate
        + KEPT_OF_ATTENTION * (sizes.queries + sizes.keys)
    )


def memory_parts(sizes: Sizes, rows: Rows, settings: TuneConfig, system: str) -> dict[str, int]:
    """What one GPU holds in a training step, by part; N are all parameters.

    Frozen modules 2 N each: the base model, D where it is another, a teacher. A full P is float32:
    weights 4 N, and 4 + 8 bytes (gradient, AdamW) of what gets a gradient, which at boundary n-1 is
    neither the head, where it is not tied, nor what of the last layer feeds no cache. The bfloat16
    that layers compute with is kept too, of one layer with gradient checkpointing. LoRA: P's own 2
    N, and 16 bytes for a weight of the adapters. Logits: 6 bytes for each of the vocabulary and a
    response token. One more gradient, of the embeddings, while a micro-batch's is added.
    """
    frozen = 1 + (system == "qsun") + (settings.loss != "nll")
    reads_all = system == "full-ft" or settings.boundary == "n"
    response_share = rows.response_tokens / rows.tokens
    logits = settings.micro_batch_size * rows.max_tokens * response_share * sizes.vocabulary
    parts = {"frozen modules": frozen * VALUE_BYTES * sizes.parameters}
    if settings.module == "lora":
        parts["prefill module"] = VALUE_BYTES * sizes.parameters + FLOAT_BYTES * sizes.adapters
        trained = sizes.adapters
    else:
        trained = sizes.parameters - (0 if reads_all else sizes.unread)
        computing = sizes.blocks // (sizes.layers if settings.gradient_checkpointing else 1)
        parts["prefill module"] = FLOAT_BYTES * sizes.parameters
        parts["its weights as computed with"] = VALUE_BYTES * computing
        parts["one more gradient of the embeddings"] = FLOAT_BYTES * sizes.head
    checkpointing = settings.gradient_checkpointing
    return parts | {
        "gradients": FLOAT_BYTES * trained,
        "AdamW's moments": MOMENT_BYTES * trained,
        "activations": activation_bytes(sizes, rows, settings, checkpointing),
        "logits": int(LOGIT_BYTES * logits),
        "CUDA": LIBRARY_BYTES,
    }


def estimate(
    config: Mapping[str, Any], shape: Skeleton, rows: Rows, settings: TuneConfig, system: str
) -> TuningEstimate:
    """What tuning on `rows` is expected to need, evaluations and tests on the way left out.

    Hours: steps x a step's FLOPs over the peak at the system's utilization. Disk: a checkpoint has
    float32 weights and moments of all that is trained, three at once; the module is bfloat16.
    """
    sizes = sizes_of(config, shape, settings)
    steps = rows.count * settings.epochs // settings.batch_size
    step_flops = settings.batch_size * row_flops(sizes, rows, settings, system)
    trained = sizes.adapters if settings.module == "lora" else sizes.parameters
    return TuningEstimate(
        steps=steps,
        step_flops=step_flops,
        full_ft_step_flops=settings.batch_size * row_flops(sizes, rows, settings, "full-ft"),
        utilization=UTILIZATION[system],
        gpu_hours=steps * step_flops / (PEAK_FLOPS * UTILIZATION[system]) / 3600,
        memory=memory_parts(sizes, rows, settings, system),
        activations_with=activation_bytes(sizes, rows, settings, True),
        activations_without=activation_bytes(sizes, rows, settings, False),
        checkpoint_bytes=trained * (FLOAT_BYTES + MOMENT_BYTES),
        module_bytes=trained * VALUE_BYTES,
    )
