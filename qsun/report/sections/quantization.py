"""The quantization: every layer's error and bits, the ten worst, and what the model lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from qsun.bundle import Manifest
from qsun.figures import inline_svg
from qsun.layer_picture import block_of, by_kind, description, layer_figure, title_of
from qsun.report.amounts import count, percent, setting
from qsun.report.blocks import Block, Heading, Notice, Picture, Section, Table, Text
from qsun.report.sources import Source, Sources

WORST = 10
WEIGHTS = ".safetensors"
Layer = Mapping[str, Any]


def quantization_section(sources: Sources) -> Section | None:
    """All quantizations that were given."""
    found = sources.of("quantization")
    if not found:
        return None
    blocks = [block for source in found for block in _quantization(source, sources, len(found) > 1)]
    summary = "; ".join(_summary(source) for source in found)
    return Section("Quantization", summary, tuple(blocks), tuple(found))


def _layers(source: Source) -> list[Layer]:
    layers: list[Layer] = source.result["quantization"]["layers"]
    return layers


def _name(source: Source) -> str:
    return str(source.record.config.get("name") or source.name)


def _summary(source: Source) -> str:
    layers = _layers(source)
    worst = max(layer["error"] for layer in layers)
    return (
        f"{count(len(layers))} layers of {_bits(layers)} bits, median error "
        f"{percent(median(layer['error'] for layer in layers), 2)} %, worst {percent(worst, 2)} %"
    )


def _is_of(source: Source, manifest: Manifest) -> bool | None:
    """Whether a record's checkpoint is a bundle's decode module, where it says what it wrote."""
    files = source.result.get("files") or {}
    weights = {name: digest for name, digest in files.items() if name.endswith(WEIGHTS)}
    if not weights:
        return None
    return all(
        manifest.files.get(f"{manifest.decode_path}/{name}") == digest
        for name, digest in weights.items()
    )


def _bits(layers: Sequence[Layer]) -> str:
    return " and ".join(setting(bits) for bits in sorted({layer["bits"] for layer in layers}))


def _quantization(source: Source, sources: Sources, several: bool) -> Iterator[Block]:
    layers, name = _layers(source), _name(source)
    if several:
        yield Heading(f"{name}, {source.name}")
    if sources.bundle is not None and _is_of(source, sources.bundle.manifest) is False:
        yield Notice("Another module", f"{source.name} did not make this bundle's decode module.")
    found = source.result["quantization"]
    size = found.get("size_ratio")
    stored = "" if size is None else f" They take {percent(size)} % of what 16 bits would."
    yield Text(
        f"{_summary(source)}. An error is that of a layer's outputs, relative to the outputs in "
        f"full precision, on calibration text.{stored}"
    )
    if found.get("perplexity"):
        yield _perplexity(found["perplexity"])
    text = description(layers, by_kind(layers))
    yield Picture(
        title_of(name),
        text,
        lambda prefix: inline_svg(layer_figure(name, layers), title_of(name), text, prefix),
        wide=True,
    )
    yield _worst(layers)
    yield _kinds(layers)
    yield _all(layers)


def _perplexity(values: Mapping[str, float]) -> Table:
    full = values["full_precision"]
    rows = tuple(
        (label, f"{values[key]:.3f}", f"{100 * (values[key] / full - 1):+.1f}")
        for label, key in (
            ("full precision", "full_precision"),
            ("quantized", "quantized"),
            ("round-to-nearest", "round_to_nearest"),
        )
    )
    return Table("Perplexity on held-out text", ("weights", "perplexity", "more, %"), rows)


def _worst(layers: Sequence[Layer]) -> Table:
    rows = tuple(
        (
            layer["name"],
            setting(layer["bits"]),
            percent(layer["error"], 2),
            percent(layer["rtn_error"], 2),
        )
        for layer in sorted(layers, key=lambda layer: -layer["error"])[:WORST]
    )
    header = ("layer", "bits", "error, %", "round-to-nearest, %")
    return Table(f"The {len(rows)} worst layers", header, rows)


def _kinds(layers: Sequence[Layer]) -> Table:
    rows = tuple(
        (
            kind,
            count(len(ours)),
            _bits(ours),
            percent(median(layer["error"] for layer in ours), 2),
            percent(max(layer["error"] for layer in ours), 2),
            percent(median(layer["rtn_error"] for layer in ours), 2),
        )
        for kind, ours in by_kind(layers).items()
    )
    header = ("kind", "layers", "bits", "median, %", "worst, %", "round-to-nearest, median, %")
    return Table("Errors by kind of layer", header, rows)


def _all(layers: Sequence[Layer]) -> Table:
    kinds = by_kind(layers)
    cells: dict[tuple[int, str], list[str]] = {}
    for kind, ours in kinds.items():
        for layer in ours:
            said = f"{percent(layer['error'], 2)} ({setting(layer['bits'])})"
            cells.setdefault((block_of(layer["name"]), kind), []).append(said)
    rows = tuple(
        (str(block), *(", ".join(cells.get((block, kind), [])) for kind in kinds))
        for block in sorted({block for block, _ in cells})
    )
    return Table("Every layer's error, % (bits), by block", ("block", *kinds), rows)
