"""Tiny real models, tokenizers, texts and run configurations, on disk as a user has them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

Architecture = Literal["llama", "qwen3"]

VOCABULARY = 512
CONTEXT = 512
HEAD_DIM = 32
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ("Ada", "Bert", "Cleo", "Dora", "Emil", "Fritz")
THINGS = ("apples", "books", "cards", "drums", "eggs", "flags")


def problem(rng: random.Random) -> dict[str, str]:
    """One row of text: a small sum as `prompt`, its worked answer as `response`."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    had, got = rng.randrange(2, 90), rng.randrange(2, 90)
    return {
        "prompt": f"{name} has {had} {thing} and is given {got} more. How many {thing} are there?",
        "response": f"{name} has {had} and {got} {thing}, which makes {had + got} {thing}.",
    }


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of text that the tiny tokenizer knows the words of."""
    rng = random.Random(seed)
    return [problem(rng) for _ in range(count)]


@cache
def _trained_tokenizer(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = problems(200, seed=0)
    tokenizer.train_from_iterator((" ".join(row.values()) for row in rows), trainer)
    # As Llama's: plain text begins with the special token that the chat template writes itself.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    return str(tokenizer.to_str())


def tiny_tokenizer(
    vocabulary: int = VOCABULARY, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text goes in and comes out."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer(vocabulary)),
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def model_config(
    architecture: Architecture = "llama",
    *,
    kv_heads: int = 2,
    hidden: int = 128,
    intermediate: int = 256,
    layers: int = 2,
    vocabulary: int = VOCABULARY,
    tied: bool = True,
) -> PretrainedConfig:
    """The shape of a tiny model; heads are `HEAD_DIM` wide."""
    cls = {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture]
    return cls(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
        # Wide enough weights that logits differ by more than bfloat16's rounding.
        initializer_range=0.1,
    )


def tiny_model(
    folder: Path,
    architecture: Architecture = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    chat_template: str | None = CHAT_TEMPLATE,
    max_shard_size: str = "1GB",
    **shape: Any,
) -> PreTrainedModel:
    """Write a random model with its tokenizer to `folder` as safetensors, and return it.

    `shape` is that of `model_config`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = model_config(architecture, **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        # Norms of ones would hide a smoothing that forgets them.
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer = tiny_tokenizer(config.vocab_size, chat_template)
    tokenizer.save_pretrained(folder)
    return model


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_definition(path: Path, *sources: Mapping[str, Any], **changes: Any) -> Path:
    """Write a text definition; without `sources`, chats over a JSONL file beside it."""
    if not sources:
        rows = write_jsonl(path.with_suffix(".jsonl"), problems(32, seed=len(path.stem)))
        columns = {"prompt": "prompt", "response": "response"}
        sources = ({"name": "sums", "kind": "jsonl", "path": rows.name, **columns},)
    settings = {"samples": 4, "min_tokens": 8, "max_tokens": 48, "seed": 3}
    definition = {"description": "tiny", **settings, "sources": list(sources), **changes}
    path.write_text(yaml.safe_dump(definition), encoding="utf-8")
    return path


def write_config(folder: Path, model: Path | str, **changes: Any) -> Path:
    """Write `run.yaml` and the texts it names to `folder`; returns its path.

    `changes` are dotted settings with a double underscore for the dot (`quantize__bits=3`); what
    a test leaves alone is as quick as it gets, without a load check.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("calibration", "heldout"):
        if not (folder / f"{name}.yaml").exists():
            write_definition(folder / f"{name}.yaml")
    run: dict[str, Any] = {
        "name": "tiny",
        "base": {"model": str(model)},
        "quantize": {
            "engine": "llmcompressor",
            "calibration": "calibration.yaml",
            "heldout": "heldout.yaml",
            "group_size": 32,
            "grid_points": 3,
        },
        "load_check": {"mode": "skip"},
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        section = run
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def tensors_on_disk(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's safetensors files, by name."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()
