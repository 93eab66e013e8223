"""auto-round, with its default settings but the iterations asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round_extension.torch.qlinear_torch import QuantLinear
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.peers.request import OWN, Request, Run, gpu, installed, main

CHECKED = "model.layers.0."
PARTS = ("qweight", "qzeros", "scales")
FORMAT = "auto_round:gptqmodel"  # GPTQ's layout at every number of bits, zeros as they are
SAMPLES_A_STEP = 8  # auto-round's default batch


def quantize(request: Request, out: Path, run: Run) -> None:
    """Tune the rounding of each block, write the checkpoint, and its first block as it reads it.

    Samples are padded on the right to the longest: its batches have one length, and a step over
    as many samples one by one rounds the weights as many times.
    """
    model = AutoModelForCausalLM.from_pretrained(request.base, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(request.base)
    # It leaves out of its loss what it takes for padding: a token that no sample has.
    used = {token for text in request.samples for token in text}
    tokenizer.pad_token_id = next(i for i in range(len(tokenizer)) if i not in used)
    longest = max(map(len, request.samples))
    samples = [padded(text, longest, tokenizer.pad_token_id) for text in request.samples]
    rounder = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=request.bits,
        group_size=request.group_size,
        sym=False,
        dataset=samples,
        nsamples=len(samples),
        seqlen=longest,
        batch_size=SAMPLES_A_STEP,
        device_map=gpu() or "cpu",
        **request.options,
    )
    with run.searching():
        rounder.quantize_and_save(output_dir=str(out), format=FORMAT)
    [folder] = out.iterdir()  # it names one of its own
    for path in folder.iterdir():
        path.rename(out / path.name)
    folder.rmdir()
    save_file(own_weights(out, request.bits, request.group_size), out / OWN)
    run.told = {
        "asymmetric": True,
        "settings": request.options,
        "versions": installed("auto-round", "torch", "transformers"),
    }


def padded(text: list[int], length: int, padding: int) -> dict[str, torch.Tensor]:
    """A sample of one row, with its mask."""
    missing = length - len(text)
    return {
        "input_ids": torch.tensor([text + [padding] * missing]),
        "attention_mask": torch.tensor([[1] * len(text) + [0] * missing]),
    }


def own_weights(out: Path, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    """The first block's weights, float32 `[out, in]`, by auto-round's own layer.

    It is given no `g_idx`, with which it leaves out outputs beyond a layer's inputs (0.16.1) and
    which says no more than that groups lie in order.
    """
    found = {}
    with safe_open(out / "model.safetensors", framework="pt") as tensors:
        for codes in tensors.keys():  # noqa: SIM118, it is no dict
            name = codes.removesuffix(".qweight")
            if name == codes or not name.startswith(CHECKED):
                continue
            parts = {part: tensors.get_tensor(f"{name}.{part}") for part in PARTS}
            inputs, outputs = parts["scales"].shape[0] * group_size, parts["scales"].shape[1]
            layer = QuantLinear(bits, group_size, inputs, outputs, bias=False)
            layer.load_state_dict(parts)
            with torch.no_grad():
                found[name] = layer(torch.eye(inputs)).t().contiguous()
    return found


if __name__ == "__main__":
    main(quantize)
