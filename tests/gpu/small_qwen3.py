"""Make a small Qwen3 with random weights and another model's tokenizer.

    python -m tests.gpu.small_qwen3 TOKENIZER_FOLDER FOLDER [--seed N]

Nothing is downloaded. Its grouped queries and its norms of queries and keys are as in Qwen3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from qsun.files import publish_folder
from qsun.models import load_tokenizer

CONTEXT = 2048


def small_config(vocabulary: int, bos: int | None, eos: int | None) -> Qwen3Config:
    """The shape: 12 layers of 512, with 8 query heads on 4 KV heads."""
    return Qwen3Config(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tokenizer = load_tokenizer(asked.tokenizer)
    tokenizer.model_max_length = CONTEXT
    torch.manual_seed(asked.seed)
    config = small_config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with publish_folder(asked.folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


if __name__ == "__main__":
    main()
