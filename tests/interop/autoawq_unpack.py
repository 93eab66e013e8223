"""Unpack a checkpoint in AutoAWQ's GEMM layout with AutoAWQ's own code, on a CPU.

    .venv-interop/bin/python tests/interop/autoawq_unpack.py CHECKPOINT OUT.safetensors

For every quantized layer NAME, OUT holds what AutoAWQ reads, in its own order: NAME.codes and
NAME.zeros (int8, 0..15, `[in, out]` and `[in / group, out]`) and NAME.weight (float16,
`[in, out]`). Prints the versions that did it, as JSON.
"""

import importlib.util
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# awq/__init__.py imports every model class, and with them transformers and datasets. A package
# registered without running that file has importable, unchanged submodules.
spec = importlib.util.find_spec("awq")
if spec is None:
    raise SystemExit("AutoAWQ is not installed here: `make interop` makes an environment with it")
sys.modules["awq"] = importlib.util.module_from_spec(spec)

from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq  # noqa: E402

PARTS = ("qweight", "qzeros", "scales")


def unpack_layer(parts: dict[str, torch.Tensor], bits: int, group: int) -> dict[str, torch.Tensor]:
    """One layer's codes, zeros and weight; its parts must be what WQLinear_GEMM declares."""
    rows, words = parts["qweight"].shape
    layer = WQLinear_GEMM(bits, group, rows, words * (32 // bits), bias=False, dev="cpu")
    for name, declared in layer.state_dict().items():
        if (parts[name].dtype, parts[name].shape) != (declared.dtype, declared.shape):
            raise ValueError(f"{name} is not {declared.dtype} {[*declared.shape]}")
    layer.load_state_dict(parts)
    codes, zeros = reverse_awq_order(*unpack_awq(layer.qweight, layer.qzeros, bits), bits)
    mask = 2**bits - 1  # unpack_awq leaves the neighbours' bits; dequantize_gemm masks them too
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, layer.group_size)
    return {"codes": codes & mask, "zeros": zeros & mask, "weight": weight}


def main(checkpoint: Path, out: Path) -> None:
    """Unpack every layer of `checkpoint` into `out`."""
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    layout = tuple(config[key] for key in ("quant_method", "bits", "zero_point", "version"))
    if layout != ("awq", 4, True, "gemm"):
        raise ValueError(f"not a 4-bit AWQ GEMM checkpoint with zero points: {layout}")
    tensors: dict[str, torch.Tensor] = {}  # of all shards: one layer may span two
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    unpacked: dict[str, torch.Tensor] = {}
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        parts = {part: tensors[f"{name}.{part}"] for part in PARTS}
        for part, tensor in unpack_layer(parts, config["bits"], config["group_size"]).items():
            unpacked[f"{name}.{part}"] = tensor
    save_file(unpacked, out)
    versions = {name: version(name) for name in ("autoawq", "torch")}
    print(json.dumps({"python": platform.python_version()} | versions))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
