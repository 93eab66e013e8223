"""The run configuration: what one run of qsun is asked to do, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsun.scheme import BITS
from qsun.settings import load_settings


@dataclass(frozen=True)
class BaseConfig:
    """Where the base model comes from.

    `model` is a Hugging Face id (`org/name`), a local folder (starting with `.`, `/` or `~`), or
    `package:NAME/FILE.gguf`, a GGUF file inside an installed package. `config` names a model
    `config.json` to plan with when the weights are not at hand.
    """

    model: str
    revision: str | None = None
    config: str | None = None


@dataclass(frozen=True)
class PrefillChoice:
    """The prefill module of one task: the folder that `qsun tune` published."""

    task: str
    module: str


@dataclass(frozen=True)
class SearchConfig:
    """How qsun's own engine calibrates, and searches for codes.

    `positions`: `responses` are those that the decode module computes in service, behind the cache
    of the task's `prefill` module, or else the base model's; `all` are whole texts, which it reads
    by itself. `sequential` inputs are those behind layers that are already quantized, and codes
    make up for the difference. `smoothing` is AWQ's, over `grid_points`; `sweeps` of coordinate
    descent follow the rounding. `damping` is added to the Gram matrix: the more, the less is fitted
    to these samples alone. Beside `responses`, texts that the decode module reads whole by itself
    have a share of `plain`. An interrupted search goes on from where it stood at most about
    `keep_every_s` seconds earlier. `memory`, as `8GiB`, is what it may hold, by default what is
    free; what waits between two blocks lies on disk where that is more.
    """

    positions: str = field(default="responses", metadata={"choices": ("responses", "all")})
    prefill: tuple[PrefillChoice, ...] = ()
    sequential: bool = True
    smoothing: str = field(default="none", metadata={"choices": ("none", "awq")})
    clip: bool = True
    rounding: str = field(default="compensated", metadata={"choices": ("compensated", "nearest")})
    sweeps: int = field(default=2, metadata={"minimum": 0, "maximum": 100})
    plain: float = field(default=0.1, metadata={"minimum": 0.0, "maximum": 10.0})
    damping: float = field(default=0.2, metadata={"minimum": 1e-6, "maximum": 1.0})
    batch_tokens: int = field(default=4096, metadata={"minimum": 1})
    keep_every_s: float = field(default=20.0, metadata={"minimum": 0.0})
    memory: str | None = None


@dataclass(frozen=True)
class QuantizeConfig:
    """How the decode module is quantized, by which engine, and with which text.

    Codes of `bits` are packed in as many, or in `stored_bits` where a server has kernels for other
    sizes only. `target_bits` takes the place of `bits`: each layer gets its own, and their mean
    over all quantized weights is at most that. It is engine qsun's alone, as `search` is;
    `grid_points` are those of AWQ's scales.
    """

    calibration: str
    heldout: str
    bits: int = field(default=4, metadata={"choices": BITS})
    stored_bits: int | None = field(default=None, metadata={"choices": BITS})
    target_bits: float | None = field(default=None, metadata={"minimum": 2.0, "maximum": 8.0})
    group_size: int = field(default=128, metadata={"choices": (32, 64, 128)})
    symmetric: bool = False
    format: str = field(
        default="compressed-tensors", metadata={"choices": ("compressed-tensors", "awq")}
    )
    keep_full_precision: tuple[str, ...] = ("lm_head",)
    tensor_parallel: int = field(default=1, metadata={"minimum": 1})
    grid_points: int = field(default=20, metadata={"minimum": 3, "maximum": 100})
    engine: str = field(default="qsun", metadata={"choices": ("qsun", "llmcompressor")})
    search: SearchConfig = SearchConfig()


@dataclass(frozen=True)
class LoadCheckConfig:
    """How vLLM is asked whether it computes what was quantized.

    Differences are between log-probabilities (nats) of the same prompt tokens.
    """

    mode: str = field(default="required", metadata={"choices": ("required", "skip")})
    python: str | None = None
    prompts: int = field(default=32, metadata={"minimum": 1})
    prompt_tokens: int = field(default=256, metadata={"minimum": 8})
    greedy_prompts: int = field(default=4, metadata={"minimum": 1})
    greedy_tokens: int = field(default=32, metadata={"minimum": 1})
    max_mean_difference: float = field(default=0.1, metadata={"minimum": 0.0})
    max_greedy_gap: float = field(default=0.5, metadata={"minimum": 0.0})
    question: str = "What is the capital of France?"
    measure_noise: bool = True
    start_timeout_s: int = field(default=600, metadata={"minimum": 10})


@dataclass(frozen=True)
class LoraConfig:
    """The adapter that a LoRA prefill module is; `targets` are linear layers of each block."""

    rank: int = field(default=16, metadata={"minimum": 1})
    alpha: float = field(default=32.0, metadata={"minimum": 0.0})
    dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.9})
    targets: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )


@dataclass(frozen=True)
class TuneConfig:
    """How a prefill module is tuned through the frozen decode module.

    The loss of a response token is its negative log-likelihood (`nll`), the KL divergence from a
    `teacher` checkpoint to what the hand-off predicts (`kl`), or `mix`: `kl_weight` of the latter
    and the rest of the former. `decode` is a quantized decode module's folder, for system qsun.
    `micro_batch_size` rows are on the device at once; `batch_size` rows make one step. `compile`
    fuses each decoder layer's operations; `auto` does so on an accelerator. `cuda_graphs` spares a
    small model the waiting between kernels; it needs one GPU. The task's own accuracy is taken
    `evaluations` times on the way, and before the first step where that is above 1.
    """

    module: str = field(default="full", metadata={"choices": ("full", "lora")})
    lora: LoraConfig = LoraConfig()
    boundary: str = field(default="n-1", metadata={"choices": ("n-1", "n")})
    decode: str | None = None
    loss: str = field(default="nll", metadata={"choices": ("nll", "kl", "mix")})
    teacher: str | None = None
    kl_weight: float = field(default=0.5, metadata={"minimum": 0.0, "maximum": 1.0})
    samples: int | None = field(default=None, metadata={"minimum": 1})
    epochs: int = field(default=1, metadata={"minimum": 1})
    batch_size: int = field(default=128, metadata={"minimum": 1})
    micro_batch_size: int = field(default=16, metadata={"minimum": 1})
    learning_rate: float = field(default=2e-5, metadata={"minimum": 0.0})
    warmup: float = field(default=0.1, metadata={"minimum": 0.0, "maximum": 1.0})
    weight_decay: float = field(default=0.0, metadata={"minimum": 0.0})
    max_grad_norm: float = field(default=1.0, metadata={"minimum": 0.0})
    gradient_checkpointing: bool = False
    compile: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    cuda_graphs: bool = False
    evaluations: int = field(default=4, metadata={"minimum": 0})
    checkpoints: int = field(default=4, metadata={"minimum": 0})
    generation_batch_size: int = field(default=64, metadata={"minimum": 1})
    test: bool = True
    test_base: bool = True


@dataclass(frozen=True)
class ExportConfig:
    """What goes into a bundle: the folder by `qsun quantize`, and a prefill module for each task.

    `references` of a task's validation rows, of at most `reference_tokens`, go along: `qsun verify`
    judges the modules by them. `decode_batch` is how many requests a decode worker is expected to
    answer at once: on a GPU it multiplies by the kernel that is the quickest then.
    With `link`, the modules' files get a second name in the bundle where both lie on one disk, and
    are not copied: whoever changes one changes the bundle.
    """

    decode: str
    prefill: tuple[PrefillChoice, ...]
    references: int = field(default=8, metadata={"minimum": 1})
    reference_tokens: int = field(default=512, metadata={"minimum": 16})
    max_tokens: int | None = field(default=None, metadata={"minimum": 16})
    decode_batch: int = field(default=32, metadata={"minimum": 1, "maximum": 256})
    link: bool = False
    licence: str | None = None


@dataclass(frozen=True)
class VerifyConfig:
    """When modules count as compatible. Limits are compared unrounded.

    A layer's K or V may differ from the base model's by `max_cache_error` (relative), or by
    `max_cache_error_ratio` times what round-to-nearest makes of it; predictions by `max_kl` nats,
    or `max_kl_ratio` times round-to-nearest's. `max_reference_difference` is relative;
    `max_growth` is the KL divergence in the last quarter of `drift_tokens` over the first's.
    """

    max_cache_error: float = field(default=0.02, metadata={"minimum": 0.0})
    max_cache_error_ratio: float = field(default=1.5, metadata={"minimum": 0.0})
    max_kl: float = field(default=0.01, metadata={"minimum": 0.0})
    max_kl_ratio: float = field(default=1.25, metadata={"minimum": 0.0})
    max_reference_difference: float = field(default=0.05, metadata={"minimum": 0.0})
    max_growth: float = field(default=2.0, metadata={"minimum": 0.0})
    drift_tokens: int = field(default=1024, metadata={"choices": (0, 256, 512, 1024, 2048, 4096)})
    seed: int = 0


@dataclass(frozen=True)
class ServeConfig:
    """How requests are routed, and how long each part of one may take, in seconds.

    `policy` is one of `policy.py`'s. At most `queue_length` requests wait for room on the
    decode workers, each `queue_s`. A prompt is read within `prefill_s`; the first token comes
    within `first_token_s` of that, each next one within `stall_s`. What fails before a client got
    anything is tried `attempts` times. A worker counts as lost after `lost_looks` looks without an
    answer, `look_s` apart. A stop waits `drain_s` for answers to end.
    """

    policy: str = field(
        default="shared",
        metadata={"choices": ("shared", "isolated", "round-robin", "power-of-two")},
    )
    queue_length: int = field(default=256, metadata={"minimum": 0})
    queue_s: float = field(default=30.0, metadata={"minimum": 0.0})
    prefill_s: float = field(default=60.0, metadata={"minimum": 0.1})
    first_token_s: float = field(default=20.0, metadata={"minimum": 0.1})
    stall_s: float = field(default=20.0, metadata={"minimum": 0.1})
    attempts: int = field(default=3, metadata={"minimum": 1})
    look_s: float = field(default=1.0, metadata={"minimum": 0.05})
    lost_looks: int = field(default=3, metadata={"minimum": 1})
    drain_s: float = field(default=30.0, metadata={"minimum": 0.0})
    max_body_bytes: int = field(default=2**22, metadata={"minimum": 1024})
    start_timeout_s: int = field(default=900, metadata={"minimum": 10})


@dataclass(frozen=True)
class TaskModules:
    """The modules of one task that are compared: folders by `qsun tune` and `qsun quantize`.

    `lm_eval` names further test sets, lm-eval's own.
    """

    task: str
    full_ft: str | None = None
    awq_full_ft: str | None = None
    sun: str | None = None
    qsun: str | None = None
    lm_eval: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated: the quantized decode module, each task's modules, and how.

    `tpot` is the time per output token of the decode module as vLLM loads it, with `tpot_tokens`
    tokens after a prompt of as many, at each of the `tpot_streams`. `unsafe_code` lets lm-eval's
    own tasks run generated code without a sandbox.
    """

    decode: str | None = None
    modules: tuple[TaskModules, ...] = ()
    batch_size: int = field(default=32, metadata={"minimum": 1})
    tpot: str = field(default="measure", metadata={"choices": ("measure", "skip")})
    tpot_tokens: int = field(default=64, metadata={"minimum": 8})
    tpot_streams: tuple[int, ...] = (1, 4)
    unsafe_code: bool = False
    seed: int = 0


@dataclass(frozen=True)
class RunConfig:
    """One run. Paths are relative to the folder of the file that names them."""

    name: str
    base: BaseConfig
    quantize: QuantizeConfig | None = None
    load_check: LoadCheckConfig = LoadCheckConfig()
    tasks: tuple[str, ...] = ()
    tune: TuneConfig = TuneConfig()
    export: ExportConfig | None = None
    verify: VerifyConfig = VerifyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = 0


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration; see `load_settings` for precedence and errors."""
    return load_settings(RunConfig, path, overrides)
