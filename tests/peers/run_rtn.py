"""Round-to-nearest by qsun's own rounding, min-max scaled; the checkpoint is dense."""

from __future__ import annotations

from pathlib import Path

from qsun.checkpoint_files import read_config_file
from qsun.models import load_model, load_tokenizer, serving_dtype
from qsun.rounding import round_layers
from qsun.scheme import Scheme
from tests.peers.layers import linear_layers
from tests.peers.request import Request, Run, installed, main


def quantize(request: Request, out: Path, run: Run) -> None:
    """Round every linear layer of the decoder blocks."""
    base = Path(request.base)
    model = load_model(base, serving_dtype(read_config_file(base / "config.json")))
    scheme = Scheme("compressed-tensors", request.bits, request.group_size, symmetric=False)
    with run.searching():
        round_layers(model, linear_layers(model), scheme)
    model.save_pretrained(out)
    load_tokenizer(base).save_pretrained(out)
    run.told = {"asymmetric": True, "versions": installed("torch", "compressed-tensors")}


if __name__ == "__main__":
    main(quantize)
