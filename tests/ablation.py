"""Ablate engine qsun's calibration and search on SmolLM2, judged where it serves.

    python -m tests.ablation RECORD --state FOLDER [--processes 4] [--only PATTERN]

Each variant quantizes the base model once, without writing a checkpoint, and is judged by the
loss (nats a token) of validation responses behind the reference prefill modules: of `math` and
`tools`, which most variants are calibrated on, and of `code`, which none is; beside it by the
perplexity of other text that the decode module reads by itself. A finished variant is kept in
`--state`; the same command goes on. On a GPU several processes share it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from qsun.calibrate.definition import load_definition
from qsun.calibrate.samples import Sample, read_sources, tokenize_sources
from qsun.config import load_config
from qsun.files import write_json
from qsun.jobs.prepare import prepare
from qsun.jobs.quantize_blocks import search_blocks
from qsun.jobs.search_state import SearchState
from qsun.models import load_model, load_tokenizer
from qsun.records import new_record
from tests.compare_engines import CALIBRATION, CONFIG, base_model
from tests.judging import REFERENCE, ROOT, Judging, lower_by, mean

BEHIND = (
    "prefill=[{task: math, module: ../exports/reference/math}, "
    "{task: tools, module: ../exports/reference/tools}]"
)
KINDS = {
    "whole texts": ("positions=all",),
    "responses, base model's cache": ("plain=0",),
    "responses, P's cache": ("plain=0", BEHIND),
    "responses, P's cache, some whole": (BEHIND,),
}
DEFAULT = "responses, P's cache, some whole"
CALIBRATED, UNSEEN = ("math", "tools"), "code"
FULL, ROWS = "full precision.json", "rows.json"
SEEDS = (17, 18, 19)
SIZES = (32, 128, 512, 1024)


@dataclass(frozen=True)
class Variant:
    """One way to quantize: `settings` of `quantize.search`; samples of `tasks` alone, if any."""

    bits: int
    samples: int
    kind: str = DEFAULT
    seed: int = SEEDS[0]
    settings: tuple[str, ...] = ()
    task: str | None = None

    @property
    def name(self) -> str:
        """What it is kept under."""
        parts = [f"w{self.bits}", str(self.samples), self.kind, self.task or "", *self.settings]
        return ", ".join([part for part in parts if part] + [f"seed {self.seed}"])


def variants() -> list[Variant]:
    """All that is compared."""
    found = [Variant(3, size, kind, seed) for size in SIZES for kind in KINDS for seed in SEEDS]
    found += [Variant(bits, size, kind) for bits in (4, 2) for size in (32, 512) for kind in KINDS]
    found += [Variant(bits, 512, task=task) for bits in (3, 2) for task in ("math", "tools")]
    settings = [f"damping={value}" for value in (0.01, 0.05, 0.1, 0.4)]
    settings += [f"sweeps={value}" for value in (0, 1, 4)]
    settings += [f"plain={value}" for value in (0.03, 0.3)]
    settings += ["sequential=false", "clip=false", "smoothing=awq"]
    found += [Variant(3, size, settings=(one,)) for size in (32, 512) for one in settings]
    found += [Variant(2, 512, settings=(f"damping={value}",)) for value in (0.01, 0.05, 0.1, 0.4)]
    found += [Variant(4, 512, settings=(f"damping={value}",)) for value in (0.01, 0.05, 0.1, 0.4)]
    return found


def main() -> None:
    """Run what is missing, then sum up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--rows", type=int, default=96, help="validation rows of each task")
    parser.add_argument("--share", type=int, help="worker: every PROCESSES-th variant from here on")
    asked = parser.parse_args()
    chosen = [one for one in variants() if asked.only in one.name]
    asked.state.mkdir(parents=True, exist_ok=True)
    if asked.share is not None:
        work(chosen[asked.share :: asked.processes], asked.state, asked.rows)
        return
    make_base(asked.state)
    command = [sys.executable, "-m", "tests.ablation", *sys.argv[1:]]
    workers = [
        subprocess.Popen([*command, "--share", str(share)], cwd=ROOT)
        for share in range(asked.processes)
    ]
    ends = [worker.wait() for worker in workers]
    run, result = load_config(CONFIG), summed_up(chosen, asked.state, asked.rows)
    new_record("ablation", run, run.seed, result).write(asked.record)
    if any(ends):
        sys.exit(f"{sum(map(bool, ends))} worker(s) failed; the record says what is missing")


def judging_in(state: Path, rows: int) -> Judging:
    """What variants are judged by; of the same rows as all others in this state."""
    judging = Judging(
        state / "base", {task: REFERENCE / task for task in (*CALIBRATED, UNSEEN)}, rows
    )
    lengths = {task: one.tolist() for task, one in judging.tokens.items()}
    kept = state / ROWS
    if not kept.exists():
        write_json(kept, lengths)
    if json.loads(kept.read_text(encoding="utf-8")) != lengths:
        sys.exit(f"{kept}: variants were judged by other rows, on another machine or --rows")
    return judging


def make_base(state: Path) -> None:
    """Convert the base model, and judge it in full precision."""
    base = state / "base"
    if base.exists():
        return
    scratch = state / ".base.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    base_model(load_config(CONFIG), scratch).rename(base)
    scratch.rmdir()


def work(chosen: list[Variant], state: Path, rows: int) -> None:
    """Make every variant that is missing."""
    base = state / "base"
    judging = judging_in(state, rows)
    model = load_model(base, "bfloat16")
    exact = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    if not (state / FULL).exists():
        write_json(state / FULL, judged(model, judging, "full precision"))
    for variant in chosen:
        path = state / f"{variant.name}.json"
        if path.exists():
            continue
        for name, weight in model.named_parameters():
            weight.data.copy_(exact[name])
        found = searched(variant, base, model)
        write_json(path, found | judged(model, judging, variant.name))


def searched(variant: Variant, base: Path, model: Any) -> dict[str, Any]:
    """Put what the variant makes of the base model into `model`; its cost."""
    chosen = ("prefill=[]", *KINDS[variant.kind], *variant.settings)
    settings = [f"quantize.search.{one}" for one in chosen]
    run = load_config(CONFIG, [f"quantize.bits={variant.bits}", "quantize.engine=qsun", *settings])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        prepared = prepare(run, CONFIG, out, False)
        samples, digest = samples_of(variant, base)
        if "positions=all" not in KINDS[variant.kind]:
            samples = [one for one in samples if one.is_served]
        state = SearchState(out, {}, False, float("inf"))
        start = time.monotonic()
        search_blocks(prepared, base, samples, state)
        seconds = time.monotonic() - start
        weights = dict(model.named_parameters())
        errors = []
        with torch.no_grad():
            for kept in state.blocks(model.config.num_hidden_layers):
                for layer in kept.layers:
                    weights[f"{layer.name}.weight"].copy_(layer.weight())
                for name, other in kept.others.items():
                    weights[name].copy_(other)
                errors += kept.report["errors"].values()
    responses = sum(len(one.tokens) - one.prompt for one in samples if one.is_served)
    return {
        "samples": len(samples),
        "samples_sha256": digest,
        "tokens": sum(len(one.tokens) for one in samples),
        "response_tokens": responses,
        "search_s": seconds,
        "mean_layer_error": fmean(errors),
    }


def samples_of(variant: Variant, base: Path) -> tuple[list[Sample], str]:
    """The calibration samples, of one task alone where the variant says so."""
    definition = replace(load_definition(CALIBRATION), samples=variant.samples, seed=variant.seed)
    read = read_sources(definition, CALIBRATION.parent)
    found = tokenize_sources(read, definition, load_tokenizer(base))
    chosen = [one for one in found.samples if variant.task in (None, one.source)]
    return chosen, found.digest


def judged(model: Any, judging: Judging, what: str) -> dict[str, Any]:
    """Losses of every row, nats, and the perplexity."""
    return {
        "losses": judging.likelihoods(model, what),
        "perplexity": judging.perplexity(model, what),
    }


def summed_up(chosen: list[Variant], state: Path, rows: int) -> dict[str, Any]:
    """Each variant's loss per token, and by how much it is above full precision."""
    judging = judging_in(state, rows)
    tokens = judging.tokens
    full = json.loads((state / FULL).read_text(encoding="utf-8"))
    found, missing = {}, []
    for variant in chosen:
        path = state / f"{variant.name}.json"
        if not path.exists():
            missing.append(variant.name)
            continue
        made = json.loads(path.read_text(encoding="utf-8"))
        losses = made.pop("losses")
        found[variant.name] = {
            "variant": asdict(variant),
            **made,
            "loss": {task: mean(one, tokens[task]) for task, one in losses.items()},
            "above_full_precision": {
                task: lower_by(full["losses"][task], one, tokens[task])
                for task, one in losses.items()
            },
        }
    exact = {task: mean(one, tokens[task]) for task, one in full["losses"].items()}
    return {
        "rows": rows,
        "response_tokens": {task: int(one.sum()) for task, one in tokens.items()},
        "full_precision": {"loss": exact, "perplexity": full["perplexity"]},
        "variants": found,
        "missing": missing,
    }


if __name__ == "__main__":
    main()
