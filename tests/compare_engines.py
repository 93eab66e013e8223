"""Compare the engines of `qsun quantize`: same model, samples and machine, in one run.

    python -m tests.compare_engines RECORD [--bits 4,3] [--samples 32] [--rows 64]

Each engine quantizes SmolLM2-135M-Instruct in a process of its own, so that its memory is its own.
Then every decode module is judged where it is served: the negative log-likelihood (nats a token) of
validation responses of `math` and `tools`, behind the cache of the reference SUN module, and the
perplexity that the engine's own record has of other text. Intervals are of paired bootstraps over
rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from qsun.config import RunConfig, load_config
from qsun.decode_checkpoint import load_dequantized
from qsun.handoff import collate, log_likelihood
from qsun.models import load_model, load_tokenizer
from qsun.prefill_module import load_prefill
from qsun.progress import announce, track
from qsun.records import new_record, read_record
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_validation
from qsun.tune.batches import Row, encode_examples

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "smollm2-135m-w4.yaml"
CALIBRATION = ROOT / "calib" / "math-tools-served.yaml"
TASKS = ("math", "tools")
QSUN = "import sys; sys.argv[0] = 'qsun'; from qsun.cli.main import main; main()"
ENGINES = {
    "llmcompressor": ("quantize.grid_points=20",),
    "qsun": (
        "quantize.search.prefill=[{task: math, module: ../exports/reference/math}, "
        "{task: tools, module: ../exports/reference/tools}]",
    ),
}
RESAMPLES = 10_000


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
        rows, base = judged_rows(run, folder, asked.rows)
        exact = likelihoods(load_model(base, "bfloat16"), rows, base, "full precision")
        results: dict[str, Any] = {}
        for bits in map(int, asked.bits.split(",")):
            judged = {}
            for engine in ENGINES:
                out = folder / f"{engine}-w{bits}"
                quantize(engine, bits, calibration(folder, asked.samples), out)
                decode = load_dequantized(out, "bfloat16")
                judged[engine] = likelihoods(decode, rows, base, f"{engine}, {bits} bits")
                results.setdefault(f"w{bits}", {})[engine] = cost(out)
            results[f"w{bits}"] |= compared(judged, exact, rows)
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
    command = ["quantize", str(CONFIG), "--engine", engine, "--out", str(out)]
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


def judged_rows(run: RunConfig, folder: Path, count: int) -> tuple[dict[str, list[Row]], Path]:
    """Validation rows of each task as tokens, and the base model's checkpoint."""
    from qsun.gguf_file import convert_gguf
    from qsun.models import locate

    source = locate(run.base.model, run.base.revision, CONFIG.parent)
    assert source.gguf is not None
    base = folder / "base"
    base.mkdir()
    convert_gguf(source.gguf, base, "bfloat16")
    tokenizer, rows = load_tokenizer(base), {}
    for name in TASKS:
        path = ROOT / "calib" / "tasks" / f"{name}.yaml"
        task = load_task(path)
        examples = read_validation(task, path.parent)[:count]
        rows[name] = encode_examples(examples, tokenizer, task.max_tokens, name).rows
    return rows, base


@torch.no_grad()
def likelihoods(
    decode: Any, rows: dict[str, list[Row]], base: Path, what: str
) -> dict[str, np.ndarray]:
    """Negative log-likelihood of each row's response behind its task's prefill module, nats."""
    found = {}
    for task, ours in rows.items():
        prefill = load_prefill(ROOT / "exports" / "reference" / task, base, "bfloat16")
        found[task] = np.array(
            [
                -float(log_likelihood(prefill, decode, collate([row.prompt], [row.response])))
                for row in track(ours, f"{what}, {task}", len(ours))
            ]
        )
    return found


def compared(
    judged: dict[str, dict[str, np.ndarray]],
    exact: dict[str, np.ndarray],
    rows: dict[str, list[Row]],
) -> dict[str, Any]:
    """Loss per token of each engine, and by how much qsun's is lower, with 95 % intervals."""
    found: dict[str, Any] = {}
    for task, ours in rows.items():
        tokens = np.array([len(row.response) for row in ours])
        drawn = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
        shorter = judged["llmcompressor"][task] - judged["qsun"][task]
        differences = shorter[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
        found[task] = {
            "tokens": int(tokens.sum()),
            "full_precision": float(exact[task].sum() / tokens.sum()),
            **{name: float(one[task].sum() / tokens.sum()) for name, one in judged.items()},
            "qsun_lower_by": float(shorter.sum() / tokens.sum()),
            "interval": np.quantile(differences, (0.025, 0.975)).tolist(),
        }
    return {"decode_positions": found}


if __name__ == "__main__":
    main()
