"""Compare the engines of `qsun quantize`: same model, samples and machine, in one run.

    python -m tests.compare_engines RECORD [--bits 4,3] [--samples 32] [--rows 64] [--tests 0]
        [--answered math,tools] [--made FOLDER]

Each engine quantizes SmolLM2-135M-Instruct in a process of its own, so that its memory is its own.
Then every decode module is judged where it is served (`tests/judging.py`): the negative
log-likelihood (nats a token) of validation responses of `math`, `tools` and `code`, which no sample
is of, behind the cache of the reference SUN module, its answers to `--tests` prompts of each test
set, and the perplexity that the engine's own record has of other text. Decode modules in `--made`
are taken as they are, to be judged by more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from qsun.config import RunConfig, load_config
from qsun.decode_checkpoint import load_dequantized
from qsun.models import load_model
from qsun.progress import announce
from qsun.records import new_record, read_record
from tests.judging import ANSWERED, REFERENCE, Judging, Measured, lower_by, mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    parser.add_argument("--tests", type=int, default=0, help="prompts of each test set")
    parser.add_argument("--answered", default=",".join(ANSWERED), help="tasks that are asked")
    parser.add_argument("--made", type=Path, help="where decode modules are, or are to be")
    asked = parser.parse_args()
    run = load_config(CONFIG)
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.made or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        everything = [int(bits) for bits in asked.bits.split(",")]
        # All of it first: Linux counts the memory of who starts a process as the process's own.
        for bits in everything:
            for engine in ENGINES:
                out = folder / f"{engine}-w{bits}"
                if not out.exists():
                    quantize(engine, bits, calibration(folder, asked.samples), out)
        base = base_model(run, Path(scratch))
        answered = {task: ANSWERED[task] for task in asked.answered.split(",")}
        modules = {name: REFERENCE / name for name in TASKS}
        judging = Judging(base, modules, asked.rows, asked.tests, answered=answered)
        exact = judged_by(judging, load_model(base, "bfloat16"), "full precision")
        results: dict[str, Any] = {}
        for bits in everything:
            judged = {}
            for engine in ENGINES:
                out = folder / f"{engine}-w{bits}"
                decode = load_dequantized(out, "bfloat16")
                judged[engine] = judged_by(judging, decode, f"{engine}, {bits} bits")
                results.setdefault(f"w{bits}", {})[engine] = cost(out)
            results[f"w{bits}"] |= compared(judged, exact, judging)
    counts = {"samples": asked.samples, "rows": asked.rows, "tests": asked.tests}
    result = counts | {"bits": results}
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


@dataclass(frozen=True)
class Judged:
    """One decode module's nats of every row and, where asked for, right answers, 1 or 0."""

    losses: Measured
    answers: Measured


def judged_by(judging: Judging, decode: PreTrainedModel, what: str) -> Judged:
    """All rows and all test prompts of every task."""
    answers = judging.answers(decode) if judging.tests else {}
    return Judged(judging.likelihoods(decode, what), answers)


def compared(judged: Mapping[str, Judged], exact: Judged, judging: Judging) -> dict[str, Any]:
    """Loss per token and accuracy of each engine; how much better qsun's are, 95 % intervals."""
    ours, theirs = judged["qsun"], judged["llmcompressor"]
    positions: dict[str, Any] = {}
    for task, tokens in judging.tokens.items():
        lower = lower_by(ours.losses[task], theirs.losses[task], tokens)
        positions[task] = {
            "tokens": int(tokens.sum()),
            "full_precision": mean(exact.losses[task], tokens),
            **{name: mean(one.losses[task], tokens) for name, one in judged.items()},
            "qsun_lower_by": lower["difference"],
            "interval": lower["interval"],
        }
    answers: dict[str, Any] = {}
    for test, right in exact.answers.items():
        # What is lower by so much in the second is higher by it in the first.
        higher = lower_by(theirs.answers[test], ours.answers[test], np.ones(len(right)))
        answers[test] = {
            "prompts": len(right),
            "full_precision": fmean(right),
            **{name: fmean(one.answers[test]) for name, one in judged.items()},
            "qsun_higher_by": higher["difference"],
            "interval": higher["interval"],
        }
    return {"decode_positions": positions, "answers": answers}


if __name__ == "__main__":
    main()
