"""The report beside a quantization's record: text and picture of real runs, on tiny models."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from qsun.calibrate.coverage import SourceCoverage, coverage
from qsun.calibrate.samples import Sample
from qsun.config import SearchConfig
from qsun.figures import DARK, THIRD
from qsun.jobs.block_walk import pieces_of
from qsun.records import PICTURE, REPORT
from tests.searching import BLOCKS, finished_search, search, write_search

SVG = "{http://www.w3.org/2000/svg}"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished search by engine qsun."""
    return finished_search(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def module(config: Path) -> Path:
    return config.parent.parent / "out" / "module"


def result_of(module: Path) -> dict[str, Any]:
    text = (module / "records" / "quantization.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["result"]
    return found


def rows_after(module: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, header and rule left out."""
    text = (module / REPORT).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    table = text[text.index("|") :].partition("\n\n")[0].splitlines()
    assert len({len(line) for line in table}) == 1  # columns stand beneath each other
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_ten_worst_layers_with_their_reasons(module: Path) -> None:
    layers = result_of(module)["quantization"]["layers"]
    worst = sorted(layers, key=lambda layer: -layer["error"])[:10]
    rows = rows_after(module, "The worst layers")
    assert [row[0] for row in rows] == [layer["name"] for layer in worst]
    for row, layer in zip(rows, worst, strict=True):
        assert row[1:4] == [
            "4",
            f"{100 * layer['error']:.2f} %",
            f"{100 * layer['rtn_error']:.2f} %",
        ]
        excess, *factors = (float(cell.removeprefix("x ")) for cell in row[4:9])
        product = 1.0
        for factor in factors:
            product *= factor
        assert product == pytest.approx(excess, rel=0.03)  # of two decimals
        assert len(row[9]) > 10


def test_coverage_is_what_the_decoder_read(config: Path, module: Path) -> None:
    samples = yaml.safe_load((config.parent / "calibration.yaml").read_text())["samples"]
    sources = result_of(module)["calibration"]["coverage"]
    assert [one["name"] for one in sources] == ["sums", "more"]
    assert sum(one["samples"] for one in sources) == samples
    positions = sum(one["decode_positions"] for one in sources)
    stages = result_of(module)["quantization"]["stages"]
    assert len(stages) == 4 * BLOCKS
    beside = sum(one["plain_positions"] for one in sources)
    assert beside > 0
    assert {stage["positions"] for stage in stages} == {positions + beside}
    tokens = result_of(module)["calibration"]["tokens"]
    # Every token but each sample's last is read, and each prompt's last by the decoder.
    prompts = sum(one["prompt_tokens"] for one in sources)
    assert prompts + positions == tokens
    for one in sources:
        assert 0 < one["decode_tokens"] <= one["decode_positions"]
        assert one["left_out"] == 0
    rows = rows_after(module, "What calibration covered")
    assert [[row[0], row[4]] for row in rows] == [
        [one["name"], f"{one['decode_positions']:,}"] for one in sources
    ]


def test_samples_without_a_response_are_counted() -> None:
    samples = [
        Sample("one", [5, 6, 7, 8, 7], prompt=3),  # the decoder reads 7 and 8
        Sample("one", [5, 6, 7], prompt=3),  # no response is left
        Sample("two", [5, 6, 9, 9, 9], prompt=2),
    ]
    shares = {"one": 3.0, "two": 1.0}
    pieces = pieces_of(samples, shares, SearchConfig(plain=0.1))
    found = [replace(one, share=round(one.share, 6)) for one in coverage(samples, pieces)]
    assert found == [
        SourceCoverage("one", 2, 1, 3, 2, 2, 5, 4, 0.75),
        SourceCoverage("two", 1, 0, 2, 3, 2, 5, 4, 0.25),
    ]
    whole = coverage(samples, pieces_of(samples, shares, SearchConfig(positions="all")))
    assert replace(whole[0], share=round(whole[0].share, 6)) == SourceCoverage(
        "one", 2, 0, 0, 8, 4, 0, 5, 0.75
    )


def module_of(config: Path) -> Path:
    return config.parent.parent / "out" / "module"


def test_the_first_layers_inherit_nothing(module: Path) -> None:
    rows = rows_after(module, "All layers")
    assert len(rows) == BLOCKS * len(KINDS)
    first = [row for row in rows if row[0].endswith(("0.self_attn.q_proj", "0.self_attn.v_proj"))]
    assert [row[4] for row in first] == ["0.00 %", "0.00 %"]
    for (
        row
    ) in first:  # the error is of all positions, what it is in all of a sample of those served
        own, total = (float(row[at].removesuffix(" %")) for at in (2, 5))
        assert total == pytest.approx(own, rel=0.4)
    assert all(float(row[4].removesuffix(" %")) > 0 for row in rows[7:])


def test_the_picture_has_a_panel_for_each_kind_and_words_in_its_place(module: Path) -> None:
    text = (module / PICTURE).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    titles, descriptions = root.findall(f"{SVG}title"), root.findall(f"{SVG}desc")
    assert (len(titles), len(descriptions)) == (1, 1)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{titles[0].get('id')} {descriptions[0].get('id')}"
    words = [" ".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")]
    assert {*KINDS, "block", "relative output error, %", "quantized", "round-to-nearest"} <= {
        *words
    }
    worst = max(result_of(module)["quantization"]["layers"], key=lambda layer: layer["error"])
    assert f"worst layer is {worst['name']}" in str(descriptions[0].text)
    rules, _, drawn = text.partition("</style>")
    assert "prefers-color-scheme: dark" in rules
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == DARK.keys() - {THIRD}
    for light, dark in DARK.items():
        assert f'[style*="stroke: {light}"]{{stroke:{dark}!important}}' in rules


def test_without_crossed_moments_what_was_inherited_is_not_known(tmp_path: Path) -> None:
    config = write_search(tmp_path, sequential=False)
    assert search(config).exit_code == 0
    layers = result_of(module_of(config))["quantization"]["layers"]
    assert {layer["numbers"]["inherited_error"] for layer in layers} == {None}
    assert {row[4] for row in rows_after(module_of(config), "All layers")} == {"not known"}
    assert "earlier layers' rounding has changed is not known" in (
        module_of(config) / REPORT
    ).read_text(encoding="utf-8")


def test_a_smoothed_block_is_compared_with_what_full_precision_reads(tmp_path: Path) -> None:
    config = write_search(tmp_path, smoothing="awq")
    assert search(config).exit_code == 0
    layers = result_of(module_of(config))["quantization"]["layers"]
    for layer in layers:
        # Scales left out would make these errors of whole multiples.
        assert layer["numbers"]["total_error"] < 4 * layer["error"]


def test_engine_llmcompressor_says_what_it_does_not_know(tiny_module: Path) -> None:
    text = (tiny_module / REPORT).read_text(encoding="utf-8")
    rows = rows_after(tiny_module, "The worst layers")
    assert len(rows) == 10
    assert {cell for row in rows for cell in row[5:9]} == {"not known"}
    assert {row[9] for row in rows} == {"not known"}
    assert "How many directions of the layers' inputs they cover is not known" in text
    [source] = result_of(tiny_module)["calibration"]["coverage"]
    assert source["decode_positions"] == result_of(tiny_module)["calibration"]["tokens"]
    assert (tiny_module / PICTURE).is_file()
