"""Measure how decode errors grow along generated outputs, for several decode modules.

    python -m tests.length_drift_curve BUNDLE RECORD DECODE [DECODE ...]

The bundle's first LoRA module and its full-precision base write texts of 1,024 tokens through the
hand-off (temperature 1, seeded, no end-of-turn token); each DECODE folder and its round-to-nearest
control then read them. RECORD gets the curves, RECORD.png and RECORD.svg the picture.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qsun.bundle import read_bundle
from qsun.config import VerifyConfig
from qsun.decode_checkpoint import DecodeCheckpoint, load_dequantized
from qsun.generation import Sampling, generate
from qsun.handoff import Boundary
from qsun.models import load_model, load_tokenizer
from qsun.prefill_module import load_prefill
from qsun.progress import announce
from qsun.records import new_record
from qsun.references import Reference, read_references
from qsun.rounding import round_layers
from qsun.verify.numeric.length_drift import length_drift

TOKENS = 1024
SEED = 0


def main() -> None:
    """Write the texts, read them, record what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("decode", type=Path, nargs="+")
    arguments = parser.parse_args()
    bundle = read_bundle(arguments.bundle)
    assert bundle.base is not None, "a bundle with LoRA modules has its base model"
    base = load_model(bundle.base, bundle.manifest.kv_layout["dtype"])
    tokenizer = load_tokenizer(bundle.base)
    task = bundle.manifest.prefill[0].task
    prefill = load_prefill(bundle.prefill[task], bundle.base, bundle.manifest.kv_layout["dtype"])
    boundary = Boundary(bundle.manifest.boundary)
    path = bundle.folder / f"verification/{task}.jsonl"
    prompts = [one.prompt for one in read_references(path, base.config.vocab_size)]
    announce(f"{len(prompts)} texts of {TOKENS} tokens")
    sampling = Sampling(max_new_tokens=TOKENS, temperature=1.0, seed=SEED, ends=False)
    made = generate(prefill, base, tokenizer, prompts, sampling, boundary, len(prompts))
    texts = [Reference(prompt, text) for prompt, text in zip(prompts, made, strict=True)]
    curves: dict[str, Any] = {}
    for folder in arguments.decode:
        announce(f"reading them by {folder}")
        with DecodeCheckpoint(folder) as checkpoint:
            names, scheme = checkpoint.layer_names(), checkpoint.scheme
        rounded = load_model(bundle.base, bundle.manifest.kv_layout["dtype"])
        round_layers(rounded, names, scheme)
        readers = [load_dequantized(folder), rounded]
        found = length_drift(prefill, base, readers, texts, boundary)
        name = f"W{scheme.bits}, group {scheme.group_size}"
        for label, curve in zip((f"{name}, qsun", f"{name}, round-to-nearest"), found, strict=True):
            curves[label] = asdict(curve) | {"growth": curve.growth}
            announce(f"{label}: grows {curve.growth:.2f}-fold")
    draw(curves, arguments.record)
    result = {"task": task, "texts": len(texts), "tokens": TOKENS, "curves": curves}
    new_record("length-drift", VerifyConfig(), SEED, result).write(arguments.record)


def draw(curves: dict[str, Any], record: Path) -> None:
    """All curves in one picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, curve in curves.items():
        edges = curve["edges"]
        middles = [(one + two) / 2 for one, two in pairwise(edges)]
        style = "--" if "round" in label else "-"
        axes.plot(middles, curve["kl"], style, marker=".", label=label)
    axes.set_xlabel("position in the generated output, tokens")
    axes.set_ylabel("KL from the full-precision decoder, nats")
    axes.set_yscale("log")
    axes.legend()
    record.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(record.with_suffix(suffix), dpi=120)


if __name__ == "__main__":
    main()
