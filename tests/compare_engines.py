"""Compare the engines of `qsun quantize`: same model, samples and machine, in one run.

    python -m tests.compare_engines RECORD [--bits 4,3] [--samples 32] [--rows 64]

Each engine quantizes SmolLM2-135M-Instruct in a process of its own, so that its memory is its own.
Then every decode module is judged where it is served (`tests/judging.py`): the negative
log-likelihood (nats a token) of validation responses of `math`, `tools` and `code`, which no sample
is of, behind the cache of the reference SUN module, and the perplexity that the engine's own record
has of other text.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qsun.config import RunConfig, load_config
from qsun.decode_checkpoint import load_dequantized
from qsun.models import load_model
from qsun.progress import announce
from qsun.records import new_record, read_record
from tests.judging import REFERENCE, Judging, Measured, lower_by, mean

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "smollm2-135m-w4.yaml"
CALIBRATION = ROOT / "calib" / "math-tools-served.yaml"
TASKS = ("math", "tools", "code")
QSUN = "import sys; sys.argv[0] = 'qsun'; from qsun.cli.main import main; main()"
ENGINES = {
    "llmcompressor": ("quantize.grid_points=20", "quantize.search={}"),
    "qsun": (
        "quantize.search.prefill=[{task: math, module: ../exports/reference/math}, "
        "{task: tools, module: ../exports/reference/tools}]",
    ),
}


def main() -> None:
    """Quantize, judge, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="validation rows of each task")
    asked = parser.parse_args()
    run = load_config(CONFIG)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        everything = [int(bits) for bits in asked.bits.split(",")]
        # All of it first: Linux counts the memory of who starts a process as the process's own.
        for bits in everything:
            for engine in ENGINES:
                out = folder / f"{engine}-w{bits}"
                quantize(engine, bits, calibration(folder, asked.samples), out)
        base = base_model(run, folder)
        judging = Judging(base, {name: REFERENCE / name for name in TASKS}, asked.rows)
        exact = judging.likelihoods(load_model(base, "bfloat16"), "full precision")
        results: dict[str, Any] = {}
        for bits in everything:
            judged = {}
            for engine in ENGINES:
                out = folder / f"{engine}-w{bits}"
                decode = load_dequantized(out, "bfloat16")
                judged[engine] = judging.likelihoods(decode, f"{engine}, {bits} bits")
                results.setdefault(f"w{bits}", {})[engine] = cost(out)
            results[f"w{bits}"] |= compared(judged, exact, judging)
    result = {"samples": asked.samples, "rows": asked.rows, "bits": results}
    new_record("engine-comparison", run, run.seed, result).write(asked.record)


def calibration(folder: Path, samples: int) -> Path:
    """The calibration text with another number of samples."""
    path = folder / "calibration.yaml"
    definition = yaml.safe_load(CALIBRATION.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(definition | {"samples": samples}), encoding="utf-8")
    return path


def quantize(engine: str, bits: int, text: Path, out: Path) -> None:
    """Run `qsun quantize` in a process of its own."""
    announce(f"engine {engine}, {bits} bits")
    settings = [
        f"quantize.bits={bits}",
        f"quantize.calibration={text}",
        "load_check.mode=skip",
        *ENGINES[engine],
    ]
    command = ["quantize", str(CONFIG.relative_to(ROOT)), "--engine", engine, "--out", str(out)]
    sets = [f"--set={setting}" for setting in settings]
    subprocess.run([sys.executable, "-c", QSUN, *command, *sets], check=True, cwd=ROOT)


def cost(out: Path) -> dict[str, Any]:
    """What the engine's record says of time, memory, samples and other text."""
    record = read_record(out / "records" / "quantization.json", "quantization")
    result = record.result
    return {
        "cost": result["cost"],
        "calibration_tokens": result["calibration"]["tokens"],
        "perplexity": result["quantization"]["perplexity"],
        "command": record.command,
    }


def base_model(run: RunConfig, folder: Path) -> Path:
    """The base model's checkpoint."""
    from qsun.gguf_file import convert_gguf
    from qsun.models import locate

    source = locate(run.base.model, run.base.revision, CONFIG.parent)
    assert source.gguf is not None
    base = folder / "base"
    base.mkdir()
    convert_gguf(source.gguf, base, "bfloat16")
    return base


def compared(judged: Mapping[str, Measured], exact: Measured, judging: Judging) -> dict[str, Any]:
    """Loss per token of each engine, and by how much qsun's is lower, with 95 % intervals."""
    found: dict[str, Any] = {}
    for task, tokens in judging.tokens.items():
        lower = lower_by(judged["qsun"][task], judged["llmcompressor"][task], tokens)
        found[task] = {
            "tokens": int(tokens.sum()),
            "full_precision": mean(exact[task], tokens),
            **{name: mean(one[task], tokens) for name, one in judged.items()},
            "qsun_lower_by": lower["difference"],
            "interval": lower["interval"],
        }
    return {"decode_positions": found}


if __name__ == "__main__":
    main()
