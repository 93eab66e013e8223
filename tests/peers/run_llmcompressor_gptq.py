"""llm-compressor's GPTQ, with its default settings, over the samples as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader, Dataset

from qsun.checkpoint_files import read_config_file
from qsun.models import load_model, load_tokenizer, serving_dtype
from qsun.quantize.awq import _no_pinning_without_accelerator
from tests.peers.layers import HEAD
from tests.peers.request import Request, Run, installed, main


def quantize(request: Request, out: Path, run: Run) -> None:
    """Quantize block by block and write a pack-quantized checkpoint."""
    base = Path(request.base)
    model = load_model(base, serving_dtype(read_config_file(base / "config.json")))
    tokenizer = load_tokenizer(base)
    weights = {
        "num_bits": request.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": request.group_size,
    }
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=[HEAD]
    )
    batches = [
        {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text)).long()}
        for text in request.samples
    ]
    with run.searching(), _no_pinning_without_accelerator():
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=DataLoader(cast("Dataset[Any]", batches), batch_size=None),
            recipe=[modifier],
            pipeline="sequential",
        )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    run.told = {
        "asymmetric": True,
        "settings": {
            "dampening_frac": modifier.dampening_frac,
            "actorder": "static",
            "block_size": modifier.block_size,
        },
        "versions": installed("llmcompressor", "compressed-tensors", "torch", "transformers"),
    }


if __name__ == "__main__":
    main(quantize)
