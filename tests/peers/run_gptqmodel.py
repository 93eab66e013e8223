"""GPTQModel's GPTQ, with its default settings but asymmetric."""

from __future__ import annotations

from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import FORMAT, GPTQConfig
from safetensors.torch import save_file

from tests.peers.request import OWN, Request, Run, gpu, installed, main

CHECKED = "model.layers.0."


def quantize(request: Request, out: Path, run: Run) -> None:
    """Quantize, write a checkpoint of format gptq_v2, and its first block as it reads it itself."""
    config = GPTQConfig(
        bits=request.bits,
        group_size=request.group_size,
        sym=False,
        format=FORMAT.GPTQ_V2,
        offload_to_disk=False,
        device=gpu() or "cpu",
    )
    model = GPTQModel.load(request.base, config, dtype=torch.bfloat16)
    samples = [{"input_ids": text, "attention_mask": [1] * len(text)} for text in request.samples]
    with run.searching():
        model.quantize(samples, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(str(out))
    own = {
        name: module.dequantize_weight().t().float().contiguous()
        for name, module in model.model.named_modules()
        if name.startswith(CHECKED) and hasattr(module, "dequantize_weight")
    }
    save_file(own, out / OWN)
    run.told = {
        "asymmetric": True,
        "settings": {
            "damp_percent": config.damp_percent,
            "desc_act": config.desc_act,
            "act_group_aware": config.act_group_aware,
            "format": "gptq_v2",
        },
        "versions": installed("gptqmodel", "torch", "transformers"),
    }


if __name__ == "__main__":
    main(quantize)
