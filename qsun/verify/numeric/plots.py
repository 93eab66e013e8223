"""Plots of a verdict: drift by layer and along the output, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from qsun.figures import new_figure
from qsun.verdict import Check

SYSTEMS = {"decode": "decode module", "round_to_nearest": "round-to-nearest"}
STYLES = {"decode": "-", "round_to_nearest": "--"}
COLOURS = {"keys": "tab:blue", "values": "tab:orange"}


def write_plots(checks: Iterable[Check], folder: Path) -> list[Path]:
    """A picture for each check that has one; gives the files."""
    written: list[Path] = []
    for check in checks:
        if check.values is None:
            continue
        _, kind, *task = check.name.split(".", 2)
        if kind == "cache":
            with _figure(folder, "cache", written) as axes:
                _cache(axes, check.values)
        elif kind == "length":
            with _figure(folder, f"length-{task[0]}", written) as axes:
                _length(axes, check.values, task[0])
    return written


@contextmanager
def _figure(folder: Path, name: str, written: list[Path]) -> Iterator[Any]:
    figure = new_figure()
    yield figure.add_subplot()
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        written.append(folder / f"{name}.{suffix}")
        figure.savefig(written[-1], dpi=150)


def _cache(axes: Any, values: dict[str, Any]) -> None:
    for system, label in SYSTEMS.items():
        layers = values[system]
        for part, colour in COLOURS.items():
            if layers is not None:
                errors = [layer[f"{part}_error"] for layer in layers]
                axes.plot(errors, STYLES[system], color=colour, label=f"{part}, {label}")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error to the base model")
    axes.set_title("K and V that the decode module would write")
    axes.set_ylim(bottom=0)
    axes.legend()


def _length(axes: Any, values: dict[str, Any], task: str) -> None:
    for system, label in SYSTEMS.items():
        curve = values[system]
        if curve is not None:
            middles = [(start + end) / 2 for start, end in pairwise(curve["edges"])]
            axes.plot(middles, curve["kl"], STYLES[system], marker=".", label=label)
    axes.set_xlabel("position in the output, tokens")
    axes.set_ylabel("KL from the base model, nats")
    axes.set_title(f"{task}: error along the output")
    axes.set_ylim(bottom=0)
    axes.legend()
