"""What the two-module forward is compared with: float32 models, and one row at a time by hand."""

from __future__ import annotations

import copy
import fcntl
import os
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from qsun.config import load_config
from qsun.files import publish_folder
from qsun.gguf_file import convert_gguf
from qsun.handoff import Boundary
from qsun.models import load_model, locate
from tests.builders import VOCABULARY, model_config

ROOT = Path(__file__).parent.parent
SHAPES: dict[str, Callable[..., Any]] = {
    "llama-gqa": lambda **shape: model_config("llama", **shape),
    "qwen3": lambda **shape: model_config("qwen3", **shape),
    "llama-mha": lambda **shape: model_config("llama", kv_heads=4, **shape),
}
SMOLLM2 = "smollm2"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@cache
def frozen(name: str, seed: int = 0) -> Any:
    """A float32 model that tests share and leave as it is: one of `SHAPES`, or `SMOLLM2`."""
    if name == SMOLLM2:
        return load_model(smollm2_folder(), "float32")
    return tiny(name, seed).requires_grad_(False)


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """A random model of one of `SHAPES`, its weights trainable."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(SHAPES[name](**shape), dtype=dtype).eval()
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("norm.weight"):
                weight.data.uniform_(0.5, 1.5)
    return model


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct's GGUF file in its package."""
    package = load_config(ROOT / "configs" / "smollm2-135m-w4.yaml").base.model
    gguf = locate(package, None, ROOT).gguf
    assert gguf is not None
    return gguf


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint, which the first process to ask converts; read only."""
    shared = Path(os.environ["QSUN_TESTS_FOLDER"])
    folder = shared / "smollm2"
    with (shared / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with publish_folder(folder) as scratch:
                convert_gguf(smollm2_file(), scratch, "bfloat16")
    return folder


def with_adapter(base: Any, seed: int = 0, scale: float = 0.05) -> Any:
    """A copy of the base with a LoRA adapter that is no identity: B, too, is random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=scale)
    return model.eval()


def merged(adapted: Any) -> Any:
    """The checkpoint that an adapter and its base amount to."""
    return copy.deepcopy(adapted).merge_and_unload()


def random_rows(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    seed: int = 0,
    vocabulary: int = VOCABULARY,
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of random tokens, special ones left out."""
    rng = random.Random(seed)

    def draw(length: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(length)]

    return [draw(length) for length in prompt_lengths], [draw(n) for n in response_lengths]


def single_model_logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """The response tokens' logits by one plain forward of one unpadded row."""
    tokens = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1]


def by_hand(
    prefill: Any,
    decode: Any,
    prompt: Sequence[int],
    response: Sequence[int],
    boundary: Boundary = Boundary.BEFORE_LAST,
) -> torch.Tensor:
    """The same of two modules: one writes transformers' own cache, the other goes token by token.

    As a server does it, and as little as possible of `qsun.handoff`'s way.
    """
    kept = DynamicCache()
    logits = []
    with torch.no_grad():
        if boundary is Boundary.LAST:
            logits += [_step(prefill, kept, prompt)]
            read = [*response[:-1]]
        else:
            _step(prefill, kept, prompt[:-1])
            read = [prompt[-1], *response[:-1]]
        logits += [_step(decode, kept, [token]) for token in read]
    return torch.stack(logits)


def greedy_by_hand(
    prefill: Any,
    decode: Any,
    prompt: Sequence[int],
    new_tokens: int,
    boundary: Boundary = Boundary.BEFORE_LAST,
) -> list[int]:
    """What two modules say after a prompt, chosen greedily; nothing ends it."""
    kept = DynamicCache()
    made: list[int] = []
    with torch.no_grad():
        if boundary is Boundary.LAST:
            made += [int(_step(prefill, kept, prompt).argmax())]
        else:
            _step(prefill, kept, prompt[:-1])
        while len(made) < new_tokens:
            last = made[-1] if made else prompt[-1]
            made += [int(_step(decode, kept, [last]).argmax())]
    return made


def _step(model: Any, kept: DynamicCache, tokens: Sequence[int]) -> torch.Tensor:
    made = model(input_ids=torch.tensor([list(tokens)]), past_key_values=kept, use_cache=True)
    logits: torch.Tensor = made.logits[0, -1]
    return logits
