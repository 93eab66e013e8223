"""Make `docs/records/decode-tpot.json` on GPUs: TPOT by batch and context for every weight format.

    python -m tests.gpu.decode_tpot RECORD STATE --vllm PYTHON [--gpus 0,1] [--minutes 9]
        [--together 4] [--share 0.92] [--shapes llama-3.1-8b,qwen3-8b-base] [--batches 1,8,...]
        [--contexts 512,2048,8192] [--only PATTERNS] [--dry-run]

Decode modules of the shapes in `configs/models` with dummy weights, one vLLM engine each
(`tpot_worker.py`), in every format, on every kernel that vLLM has for it there. Some load on a GPU
`--together`, to be timed one after another (`tpot_turns.py`). A call starts what fits in
`--minutes` and can be made again. Beside each time stands the floor: the bytes that a step has to
read, at the bandwidth that a plain read reached on that GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsun.checkpoint_files import read_config_file
from qsun.kv_layout import DTYPE_BYTES, kv_layout
from qsun.records import new_record
from qsun.skeleton import skeleton
from tests.gpu.job_runner import ROOT
from tests.gpu.tpot_turns import Engine, Turns, run_turns

WORKER = ROOT / "tests" / "gpu" / "tpot_worker.py"
KERNEL = re.compile(r"Using (\w+) for CompressedTensors")
GROUP = 128


@dataclass(frozen=True)
class Format:
    """How weights are stored: `weights` and `activations` as compressed-tensors says it.

    `backend` is vLLM's `--linear-backend`: whose kernels multiply; `auto` leaves it to vLLM.
    """

    name: str
    packing: str | None = None
    weights: dict[str, Any] | None = None
    activations: dict[str, Any] | None = None
    backend: str = "auto"
    weight_bits: float = 16.0

    @property
    def label(self) -> str:
        """The format, and whose kernels where that is not left to vLLM."""
        return self.name if self.backend == "auto" else f"{self.name}, {self.backend}"

    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of a model's `config.json`."""
        if self.weights is None:
            return None
        scheme = {"targets": ["Linear"], "weights": self.weights}
        scheme |= {"input_activations": self.activations} if self.activations else {}
        return {
            "quant_method": "compressed-tensors",
            "format": self.packing,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": scheme},
        }


def _int4(symmetric: bool) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP} | {
        "symmetric": symmetric
    }


_TOKEN_FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
_CHANNEL_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
# Scales of 16 bits a group, and zeros as wide as codes where asymmetric.
_SYMMETRIC, _ASYMMETRIC = 4 + 16 / GROUP, 4 + 20 / GROUP
_PACKED = "pack-quantized"
FORMATS = (
    Format("bfloat16"),
    *(
        Format("W4A16 asymmetric", _PACKED, _int4(False), None, one, _ASYMMETRIC)
        for one in ("auto", "marlin", "triton")
    ),
    *(
        Format("W4A16 symmetric", _PACKED, _int4(True), None, one, _SYMMETRIC)
        for one in ("auto", "marlin")
    ),
    Format("W4A8 FP8", _PACKED, _int4(True), _TOKEN_FP8, weight_bits=_SYMMETRIC),
    Format("FP8 W8A8", "float-quantized", _CHANNEL_FP8, _TOKEN_FP8, weight_bits=8.0),
)


@dataclass(frozen=True)
class Sweep:
    """What is timed of one shape in one format."""

    shape: str
    format: Format
    state: Path

    @property
    def name(self) -> str:
        """Fit for a file."""
        return f"{self.shape}-{re.sub('[^a-zA-Z0-9]+', '-', self.format.label)}".lower()

    @property
    def out(self) -> Path:
        """Where the worker's rows go."""
        return self.state / "rows" / f"{self.name}.json"

    def write_model(self) -> Path:
        """A folder with a `config.json` alone."""
        folder = self.state / "models" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        config = shape_config(self.shape)
        if quantization := self.format.quantization():
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        return folder

    def engine(self, python: str, batches: str, contexts: str) -> Engine:
        """What is started for it."""
        command = [python, str(WORKER), str(self.state / "models" / self.name), str(self.out)]
        command += ["--batches", batches, "--contexts", contexts, "--backend", self.format.backend]
        log = self.state / "logs" / f"{self.name}.log"
        return Engine(self.name, command, self.out, log, weight_bytes(self.shape, self.format))

    def result(self) -> dict[str, Any]:
        """The rows, with floors and the kernel that vLLM took."""
        found = json.loads(self.out.read_text(encoding="utf-8"))
        log = (self.state / "logs" / f"{self.name}.log").read_text(encoding="utf-8")
        kernels = sorted(set(KERNEL.findall(log)))
        rows = found.pop("rows")
        for row in rows:
            if found["bytes_per_s"]:
                needed = step_bytes(self.shape, self.format, row["batch"], row["context_tokens"])
                row["floor_s"] = needed / found["bytes_per_s"]
        return {
            "shape": self.shape,
            "kernels": kernels,
            "label": self.format.label,
            **asdict(self.format),
            **found,
            "tpot": rows,
        }


def shape_config(shape: str) -> dict[str, Any]:
    """A shape's `config.json`."""
    return dict(read_config_file(ROOT / "configs" / "models" / shape / "config.json"))


def weight_bytes(shape: str, format_: Format) -> float:
    """What a step reads of the weights: all but the embeddings, once."""
    config = shape_config(shape)
    inside = sum(
        one.in_features * one.out_features
        for one in skeleton(config).linears
        if "lm_head" not in one.name
    )
    head = int(config["vocab_size"]) * int(config["hidden_size"])
    return inside * format_.weight_bits / 8 + 2 * head


def step_bytes(shape: str, format_: Format, batch: int, context: int) -> float:
    """What one decode step must read: the weights, and each request's keys and values."""
    layout = kv_layout(shape_config(shape))
    cache = 2 * layout.layers * layout.kv_heads * layout.head_dim * DTYPE_BYTES[layout.dtype]
    return weight_bytes(shape, format_) + batch * context * cache


def sweeps(shapes: list[str], state: Path, only: str) -> Iterator[Sweep]:
    """Every shape in every format."""
    for shape in shapes:
        for one in FORMATS:
            found = Sweep(shape, one, state)
            if any(part in found.name for part in only.split(",")):
                yield found


def main() -> None:
    """Work through the formats for a while, then sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--vllm", required=True, help="the Python that has vLLM")
    parser.add_argument("--gpus", default="0", help="numbers, with commas")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--share", type=float, default=0.92, help="of a GPU's memory, for all")
    parser.add_argument("--together", type=int, default=4, help="engines loaded on a GPU at once")
    parser.add_argument("--shapes", default="llama-3.1-8b,qwen3-8b-base")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--contexts", default="512,2048,8192")
    parser.add_argument("--only", default="", help="sweeps whose name has one of these in it")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    state = asked.state.resolve()
    chosen = list(sweeps(asked.shapes.split(","), state, asked.only))
    engines = [one.engine(asked.vllm, asked.batches, asked.contexts) for one in chosen]
    if asked.dry_run:
        print("\n".join(f"{one.name}: {' '.join(one.command)}" for one in engines))
        return
    for one in chosen:
        one.write_model()
    run_turns(engines, Turns(tuple(asked.gpus.split(",")), asked.together, asked.share, end))
    done = [one for one in chosen if one.out.exists()]
    result = {
        "weights": "dummies",
        "missing": [one.name for one in chosen if one not in done],
        "sweeps": [one.result() for one in done],
    }
    seed = 0
    new_record("decode-tpot", chosen[0].format, seed, result).write(asked.record)
    print(f"{len(done)} of {len(chosen)} sweeps are done")


if __name__ == "__main__":
    main()
