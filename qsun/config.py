"""The run configuration: what one run of qsun is asked to do, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
class QuantizeConfig:
    """How the decode module is quantized, and with which text."""

    calibration: str
    heldout: str
    bits: int = field(default=4, metadata={"choices": (3, 4, 8)})
    group_size: int = field(default=128, metadata={"choices": (32, 64, 128)})
    symmetric: bool = False
    format: str = field(
        default="compressed-tensors", metadata={"choices": ("compressed-tensors", "awq")}
    )
    keep_full_precision: tuple[str, ...] = ("lm_head",)
    tensor_parallel: int = field(default=1, metadata={"minimum": 1})
    grid_points: int = field(default=20, metadata={"minimum": 3, "maximum": 100})


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
class RunConfig:
    """One run. Paths are relative to the folder of the file that names them."""

    name: str
    base: BaseConfig
    quantize: QuantizeConfig
    load_check: LoadCheckConfig = LoadCheckConfig()
    seed: int = 0


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration; see `load_settings` for precedence and errors."""
    return load_settings(RunConfig, path, overrides)
