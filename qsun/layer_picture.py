"""The picture of a quantization: each layer's error by block, a panel for each kind of layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qsun.figures import MAIN, OTHER, STYLE, new_figure, write_svg

COLUMNS = 4
PANEL_INCHES = 2.4, 2.1
FOUND, ROUNDED = "quantized", "round-to-nearest"


def write_picture(name: str, layers: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Draw the layers of a record's `quantization` into an SVG; gives the text in place of it."""
    text = description(layers, by_kind(layers))
    write_svg(layer_figure(name, layers), path, title_of(name), text)
    return text


def title_of(name: str) -> str:
    """The title of a quantization's picture."""
    return f"{name}: error of each quantized layer"


def layer_figure(name: str, layers: Sequence[Mapping[str, Any]]) -> Any:
    """The figure itself."""
    import matplotlib

    kinds = by_kind(layers)
    columns = min(COLUMNS, len(kinds))
    rows = -(-len(kinds) // columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(max(columns, 3) * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 1)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (kind, ours) in zip(grid.flat, kinds.items(), strict=False):
            _panel(axes, kind, ours)
        grid.flat[0].set_ylim(bottom=0)
        for axes, above in zip(
            grid.flat[len(kinds) :], grid.flat[len(kinds) - columns :], strict=False
        ):
            axes.set_visible(False)
            above.tick_params(labelbottom=True)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.suptitle(title_of(name))
        figure.supxlabel("block")
        figure.supylabel("relative output error, %")
        figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
    return figure


def _panel(axes: Any, kind: str, layers: Sequence[Mapping[str, Any]]) -> None:
    blocks = [block_of(layer["name"]) for layer in layers]
    for key, label, style, colour in (
        ("rtn_error", ROUNDED, "--", OTHER),
        ("error", FOUND, "-", MAIN),
    ):
        errors = [100 * layer[key] for layer in layers]
        axes.plot(blocks, errors, style, color=colour, marker=".", markersize=4, label=label)
    axes.set_title(kind, fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, linewidth=0.5)


def by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Layers by the last part of their names, kinds and layers in model order."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    return kinds


def block_of(name: str) -> int:
    """The block that a layer is in, by the first number in its name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def description(
    layers: Sequence[Mapping[str, Any]], kinds: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """What the picture shows, in words."""
    worst = max(layers, key=lambda layer: layer["error"])
    parts = "; ".join(
        f"{kind} {100 * median(one['error'] for one in ours):.2f} % "
        f"(round-to-nearest {100 * median(one['rtn_error'] for one in ours):.2f} %)"
        for kind, ours in kinds.items()
    )
    return (
        f"Relative output error of {len(layers)} layers by block, a panel for each kind of layer. "
        f"Medians: {parts}. The worst layer is {worst['name']}, {100 * worst['error']:.2f} %."
    )
