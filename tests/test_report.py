"""The report's page: every section from its records, and the same numbers in both formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qsun.files import sha256_file
from qsun.report.blocks import Notice, Page, Picture, Section, Table, Text
from qsun.report.contents import contents_of
from qsun.report.html import html_page
from qsun.report.markdown import markdown_page, plain
from qsun.report.sources import read_sources
from tests.reports import (
    CREATED,
    OTHER_BUNDLE,
    Tables,
    bench,
    check,
    every_record,
    fleet,
    kernel_times,
    latency,
    point,
    put,
    put_bundle,
    quantization,
    scorecard,
    verdict,
)


def page_of(*paths: Path) -> Page:
    return contents_of(read_sources(paths))


def section_of(*paths: Path, title: str) -> Section:
    return next(one for one in page_of(*paths).sections if one.title == title)


def rows(section: Section, caption: str) -> dict[str, tuple[str, ...]]:
    """A table's rows by their headers."""
    found = next(one for one in tables(section) if one.caption.startswith(caption))
    return {row[0]: row[1:] for row in found.rows}


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def notices(section: Section) -> list[str]:
    found = [block for block in section.blocks if isinstance(block, Notice)]
    return [f"{block.word}: {block.text}" for block in found]


def pictures(section: Section) -> list[str]:
    return [block.title for block in section.blocks if block.kind == "picture"]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A bundle with a record of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    digest = put_bundle(folder / "bundle")
    return page_of(folder / "bundle", *every_record(folder, digest))


@pytest.fixture(scope="module")
def drawn(whole: Page) -> str:
    return html_page(whole)


def test_a_bundle_is_what_its_manifest_says(tmp_path: Path) -> None:
    digest = put_bundle(tmp_path)
    section = section_of(tmp_path, title="Bundle")
    facts = rows(section, "What the bundle is")
    assert facts["name"] == ("Demo bundle",)
    assert facts["base model"] == ("org/base-model",)
    assert facts["base model's revision"] == ("abc123",)
    assert facts["decode module"] == ("W4A16 asymmetric, group 64",)
    assert facts["manifest's SHA-256"] == (digest,)
    assert rows(section, "Tasks")["math"][:3] == ("lora, rank 8", "sun", "n-1")
    weights = rows(section, "Weights")
    assert weights["model.safetensors of the base model"] == ("b0",)
    assert len(weights["decode/model.safetensors"][0]) == 64
    assert section.summary == "2 tasks (math, code), decode module W4A16 asymmetric, group 64"


def test_records_that_no_page_shows_are_named(tmp_path: Path) -> None:
    put_bundle(tmp_path)
    empty = put(tmp_path / "records/simulation.json", "simulation", {})
    page = page_of(tmp_path)
    assert page.left_out == (
        "records/tuning-math.json (tuning)",
        f"records/{empty.name} (simulation)",
    )
    assert "Not shown: records/tuning-math.json (tuning)" in " ".join(Tables(html_page(page)).text)


def test_what_is_not_recorded_has_no_section_but_a_command(tmp_path: Path) -> None:
    page = page_of(put(tmp_path / "verdict.json", "verdict", verdict()))
    assert [section.title for section in page.sections] == ["Verdict"]
    assert {one.what: one.command for one in page.absent}["the scorecard"].startswith(
        "qsun evaluate"
    )
    assert len(page.absent) == 6
    assert [one.what for one in page.absent] == [
        *("what the bundle is", "the scorecard", "errors and bits by layer"),
        *("TPOT by decode batch", "throughput and TPOT under load", "decode workers needed"),
    ]


def test_a_verdict_says_what_failed(tmp_path: Path) -> None:
    bad = check("numeric.hand_off.math", "failed", "KL 2.5 nats"), check("served.x", "unchecked")
    section = section_of(put(tmp_path / "v.json", "verdict", verdict(None, *bad)), title="Verdict")
    assert section.summary == "INCOMPATIBLE, 2 of 4 checks passed"
    assert notices(section) == ["Not passed: numeric.hand_off.math, served.x"]
    assert rows(section, "Checks that did not pass")["numeric.hand_off.math"] == (
        *("failed", "KL 2.5 nats", "tune it again"),
    )
    assert rows(section, "Checks by level")["numeric"] == ("1", "1", "0", "0", "53.1")
    assert rows(section, "What the passed checks")["numeric.cache"] == ("error 0.219",)


@pytest.mark.parametrize(
    ("more", "word"),
    [([], "COMPATIBLE, 2 of 2"), ([check("served.x", "unchecked")], "NOT FULLY CHECKED, 2 of 3")],
)
def test_a_verdict_without_failures(tmp_path: Path, more: list[dict[str, Any]], word: str) -> None:
    path = put(tmp_path / "v.json", "verdict", verdict(None, *more))
    assert section_of(path, title="Verdict").summary == f"{word} checks passed"


def test_a_scorecard_has_intervals_and_floors(tmp_path: Path) -> None:
    floors = [
        {"system": "qsun", "test": "math.seen", "accuracy": 0.625, "of": None, "ratio": None},
        {"system": "qsun", "test": "math.seen", "accuracy": None, "of": "base", "ratio": 2.0},
    ]
    result = scorecard(floors=floors, warnings=["base: P = D"], limit=16)
    section = section_of(put(tmp_path / "s.json", "scorecard", result), title="Scorecard")
    table = next(one for one in tables(section) if one.caption == "Right answers")
    assert table.rows[1] == ("math.seen", "qsun", "62.5", "47.0 to 76.0", "40")
    held = next(one for one in tables(section) if one.caption.startswith("Floors"))
    assert held.rows[0] == ("math.seen", "qsun", "62.5", "62.5", "an accuracy", "NO")
    assert held.rows[1] == ("math.seen", "qsun", "62.5", "5.0", "200.0 % of base's", "yes")
    assert notices(section) == ["Warning: base: P = D", "Below the floor: math.seen: qsun"]
    assert "1 BELOW THEIR FLOOR" in section.summary
    assert rows(section, "Differences")["math.seen"] == (
        *("qsun minus base", "+60.0", "45.0 to 74.0", "0.00012"),
    )


def test_a_quantization_shows_its_ten_worst_layers_and_all(tmp_path: Path) -> None:
    path = put(tmp_path / "q.json", "quantization", quantization(), {"name": "small"})
    section = section_of(path, title="Quantization")
    worst = rows(section, "The 10 worst layers")
    assert list(worst)[:2] == ["model.layers.5.self_attn.q_proj", "model.layers.5.mlp.down_proj"]
    assert worst["model.layers.5.mlp.down_proj"] == ("4", "6.00", "18.00")
    assert rows(section, "Every layer's error")["0"] == ("1.00 (3)", "1.00 (3)")
    assert rows(section, "Errors by kind")["down_proj"] == ("6", "3 and 4", "3.50", "6.00", "10.50")
    assert rows(section, "Perplexity")["quantized"] == ("11.727", "+5.9")
    assert section.summary == "12 layers of 3 and 4 bits, median error 3.50 %, worst 6.00 %"
    assert pictures(section) == ["small: error of each quantized layer"]


def test_layers_of_one_kind_and_block_are_all_there(tmp_path: Path) -> None:
    result = quantization()
    for layer in result["quantization"]["layers"][:3]:
        layer["name"] = f"model.layers.0.mlp.experts.{layer['error']}.down_proj"
    section = section_of(put(tmp_path / "q.json", "quantization", result), title="Quantization")
    assert rows(section, "Every layer's error")["0"][0] == "1.00 (3), 1.00 (3), 2.00 (4)"


def test_tpot_by_batch_stands_beside_bfloat16_and_the_floor(tmp_path: Path) -> None:
    path = put(tmp_path / "l.json", "latency", latency())
    section = section_of(path, title="TPOT by decode batch")
    table = tables(section)[0]
    assert table.header == (
        *("decode batch", "bfloat16, ms", "W4A16, ms", "W4A16, bandwidth floor, ms"),
        "W4A16, of bfloat16's",
    )
    assert table.rows[1] == ("2", "12.0", "7.00", "2.50", "0.583")
    assert table.caption == "TPOT by decode batch, contexts of 512 tokens"
    assert rows(section, "Prefill")["256"] == ("32.1",)
    assert pictures(section) == ["TPOT by decode batch, contexts of 512 tokens"]


def test_latencies_of_other_hardware_are_apart(tmp_path: Path) -> None:
    ours = put(tmp_path / "a.json", "latency", latency())
    theirs = put(tmp_path / "b.json", "latency", latency(), hardware={"accelerator": "Another"})
    section = section_of(ours, theirs, title="TPOT by decode batch")
    assert notices(section)[0].startswith("Not compared: these were measured on other hardware: ")
    assert len(pictures(section)) == 2
    assert section.sources[1].hardware == "Another"


def test_kernels_stand_side_by_side_and_the_bundle_has_its_advice(tmp_path: Path) -> None:
    put_bundle(tmp_path / "bundle")
    path = put(tmp_path / "k.json", "decode-tpot", kernel_times())
    section = section_of(tmp_path / "bundle", path, title="TPOT by format and kernel")
    assert section.summary == "bfloat16, W4A16 asymmetric, FP8 W8A8"
    short, long = tables(section)
    assert short.caption == "TPOT in ms by decode batch: large, contexts of 512 tokens"
    assert short.header == ("format", "kernel", "1", "8")
    assert short.rows == (
        ("bfloat16", "vLLM's choice", "6.00", "13.0"),
        ("W4A16 asymmetric", "Machete", "5.00", "12.0"),
        ("W4A16 asymmetric", "Marlin", "4.00", "11.0"),
        ("FP8 W8A8", "Cutlass", "4.50", "11.5"),
    )
    assert "2048" in long.caption
    told = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert "For this bundle, kernels on a GPU: marlin, for about 32 answers at once" in told
    drawn = section.blocks[2]
    assert isinstance(drawn, Picture)
    assert "W4A16 asymmetric, marlin: 4.00 at 1, 11.0 at 8" in drawn.text
    assert "W4A16 asymmetric, floor: 1.00 at 1" in drawn.text
    assert "FP8" not in drawn.text
    assert "bfloat16, floor" not in drawn.text


def test_a_scorecards_tpot_is_shown_too(tmp_path: Path) -> None:
    streams = [{"streams": 4, "base_s": 0.02, "decode_s": 0.01, "ratio": 0.5}]
    result = scorecard(tpot={"measured": True, "by_streams": streams})
    path = put(tmp_path / "s.json", "scorecard", result)
    section = section_of(path, title="TPOT by decode batch")
    assert rows(section, "TPOT in vLLM")["4"] == ("10.0", "20.0", "0.500")


def test_systems_under_equal_loads_stand_side_by_side(tmp_path: Path) -> None:
    paths = [
        put(tmp_path / "qsun.json", "bench", bench("qsun", decode="W4A16")),
        put(tmp_path / "isolated.json", "bench", bench("isolated")),
    ]
    section = section_of(*paths, title="Under load")
    assert notices(section) == []
    failed = tables(section)[-1]
    assert failed.caption == "Requests that failed"
    assert len(failed.rows) == 8
    assert failed.rows[1] == ("1 requests/s, Zipf alpha 0", "qsun", "time-out", "1")
    table = tables(section)[1]
    assert [row[:2] for row in table.rows[:3]] == [
        ("1 requests/s, Zipf alpha 0", "isolated"),
        ("1 requests/s, Zipf alpha 0", "qsun"),
        ("1 requests/s, Zipf alpha 1", "isolated"),
    ]
    assert table.rows[0][2:5] == ("2", "50.0 (45.0 to 55.0)", "25.0 (22.5 to 27.5)")
    assert table.rows[0][-2:] == ("40", "1")
    assert tables(section)[2].rows[0][2:5] == ("2", "111 (99.9 to 122)", "222 (200 to 244)")
    assert "prompt tokens fixed:256" in table.caption
    assert rows(section, "Systems")["qsun"][1] == "W4A16"
    assert pictures(section) == [
        *("tokens/s by requests/s, Zipf alpha 0", "TPOT p50 by requests/s, Zipf alpha 0"),
        *("tokens/s by requests/s, Zipf alpha 1", "TPOT p50 by requests/s, Zipf alpha 1"),
        *("tokens/s by Zipf alpha, 1 requests/s", "TPOT p50 by Zipf alpha, 1 requests/s"),
        *("tokens/s by Zipf alpha, 2 requests/s", "TPOT p50 by Zipf alpha, 2 requests/s"),
    ]


def test_an_interrupted_bench_is_marked_with_what_is_missing(tmp_path: Path) -> None:
    result = bench("sun", complete=False, missing=["4 requests/s, run 1", "4 requests/s, run 2"])
    section = section_of(put(tmp_path / "b.json", "bench", result), title="Under load")
    assert notices(section)[0] == (
        "Interrupted: b.json is not complete. Not run: 4 requests/s, run 1, 4 requests/s, run 2"
    )
    assert section.summary.endswith("INTERRUPTED")
    assert {row[1] for row in tables(section)[1].rows} == {"sun (interrupted)"}


def test_a_bench_that_was_interrupted_at_once_is_still_said(tmp_path: Path) -> None:
    result = bench("sun", complete=False, missing=["all"]) | {"points": []}
    section = section_of(put(tmp_path / "b.json", "bench", result), title="Under load")
    assert notices(section) == ["Interrupted: b.json is not complete. Not run: all"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"hardware": {"accelerator": "Another"}},
            "hardware Some GPU, 2 cores, 23.5 GiB of memory, machine x86_64 against Another",
        ),
        ({"tasks": ["math"]}, "tasks math, code against math"),
    ],
)
def test_what_is_not_comparable_is_said_and_kept_apart(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    hardware = {key: value for key, value in change.items() if key == "hardware"}
    result = bench("qsun", **{key: change[key] for key in change.keys() - {"hardware"}})
    paths = [
        put(tmp_path / "sun.json", "bench", bench("sun")),
        put(tmp_path / "qsun.json", "bench", result, **hardware),
    ]
    section = section_of(*paths, title="Under load")
    assert notices(section)[0] == f"Not compared: sun.json and qsun.json: {said}"
    groups = [{row[1] for row in one.rows} for one in tables(section)[1::3]]
    assert groups == [{"sun"}, {"qsun"}]


def test_a_load_that_one_system_ran_alone_is_said(tmp_path: Path) -> None:
    more = [point(1.0, 1.0, 50), point(8.0, 1.0, 400)]
    paths = [
        put(tmp_path / "sun.json", "bench", bench("sun", more[:1])),
        put(tmp_path / "qsun.json", "bench", bench("qsun", more)),
    ]
    assert any(
        one.startswith("Not compared: 8 requests/s") and one.endswith("seed 0: qsun alone")
        for one in notices(section_of(*paths, title="Under load"))
    )


def test_a_closed_loop_and_a_trace_are_loads_too(tmp_path: Path) -> None:
    points = [
        point(None, 1.0, 50, concurrency=4),
        point(None, 1.0, 90, concurrency=8),
        point(2.5, None, 70, arrivals="trace", trace="25 requests of 10 s"),
    ]
    del points[2]["load"]["prompt_tokens"]
    section = section_of(
        put(tmp_path / "b.json", "bench", bench("sun", points)), title="Under load"
    )
    assert pictures(section)[0].startswith("tokens/s by requests at once")
    loads = [row[0] for row in tables(section)[1].rows]
    assert loads[0].startswith("4 requests at once, Zipf alpha 1")
    assert loads[2] == "2.5 requests/s, trace arrivals, trace 25 requests of 10 s"


def test_two_records_of_one_system_have_names_of_their_own(tmp_path: Path) -> None:
    paths = [
        put(tmp_path / "one.json", "bench", bench("sun")),
        put(tmp_path / "two.json", "bench", bench("sun", workers={"prefill": 2, "decode": 4})),
    ]
    labels = {row[1] for row in tables(section_of(*paths, title="Under load"))[1].rows}
    assert labels == {"sun, one.json", "sun, two.json"}


def test_records_of_one_system_with_loads_of_their_own_are_one(tmp_path: Path) -> None:
    loads = [point(1.0, alpha, 50 + alpha) for alpha in (0.0, 1.0, 2.0)]
    paths = [
        put(tmp_path / f"{number}.json", "bench", bench("sun", [one]))
        for number, one in enumerate(loads)
    ]
    section = section_of(*paths, title="Under load")
    assert {row[1] for row in tables(section)[1].rows} == {"sun"}
    assert pictures(section)[0] == "tokens/s by Zipf alpha"
    again = put(tmp_path / "again.json", "bench", bench("sun", [point(1.0, 0.0, 99)]))
    apart = section_of(*paths, again, title="Under load")
    assert "sun, again.json" in {row[1] for row in tables(apart)[1].rows}


def test_decode_workers_needed(tmp_path: Path) -> None:
    section = section_of(
        put(tmp_path / "f.json", "simulation", fleet()), title="Decode workers (GPUs) needed"
    )
    assert tables(section)[0].rows[1] == (
        *("isolated", "8", "4", "1", "8", "2", "31.0", "48.0", "900"),
    )
    assert pictures(section) == ["Decode workers by tasks; requests/s 4, Zipf alpha 1"]


def test_a_pool_that_was_not_found_is_no_number(tmp_path: Path) -> None:
    result = fleet()
    result["fleet"][0]["decode_workers"] = None
    section = section_of(
        put(tmp_path / "f.json", "simulation", result), title="Decode workers (GPUs) needed"
    )
    assert tables(section)[0].rows[0][4] == "more than were tried"


def test_several_bundles_are_told_apart(tmp_path: Path) -> None:
    digest = put_bundle(tmp_path / "bundle")
    paths = [
        tmp_path / "bundle",
        put(tmp_path / "qsun.json", "bench", bench("qsun", bundle=digest)),
        put(tmp_path / "sun.json", "bench", bench("sun", bundle=OTHER_BUNDLE)),
        put(tmp_path / "isolated.json", "bench", bench("isolated")),
    ]
    letters = rows(section_of(*paths, title="Bundle"), "Bundles")
    assert letters["bundle 1"] == ("the bundle of this page, qsun.json", digest)
    assert letters["bundle 2"] == ("sun.json", OTHER_BUNDLE)
    labels = {row[1] for row in tables(section_of(*paths, title="Under load"))[1].rows}
    assert labels == {"qsun (bundle 1)", "sun (bundle 2)", "isolated (no bundle named)"}


def test_verdicts_of_two_bundles_without_either(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"{name}.json", "verdict", verdict(name * 64)) for name in ("a", "b")]
    page = page_of(*paths)
    assert page.sections[0].title == "Bundles"
    assert "(bundle 1); COMPATIBLE" in page.sections[1].summary


def test_every_section_names_what_made_its_numbers(whole: Page, drawn: str) -> None:
    page = Tables(drawn)
    measured = [section for section in whole.sections if section.title != "Bundle"]
    assert len(measured) == 6
    for section in measured:
        assert section.sources
        for source in section.sources:
            facts = dict(page.tables[f"Provenance of {source.name}"])
            assert facts["SHA-256"] == source.sha256
            assert facts["command"] == f"qsun {source.record.kind} of this test"
            assert facts["seed"] == "7"
            assert facts["made"] == CREATED
            assert facts["hardware"].startswith("Some GPU")
            assert facts["versions"] == "python 3.11.7, qsun 0.1.0"


def cells_of_markdown(text: str) -> list[list[list[str]]]:
    """Every table's rows, as a reader sees them."""
    found: list[list[list[str]]] = []
    for group in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        lines = [line[2:-2].split(" | ") for line in group.splitlines()]
        found.append([lines[0], *lines[2:]])
    return found


def test_markdown_has_the_pages_tables(whole: Page, drawn: str) -> None:
    html, markdown = Tables(drawn), cells_of_markdown(markdown_page(whole))
    for caption, table in html.tables.items():
        shown = [[plain(cell) for cell in row] for row in table]
        assert any(shown == found[-len(shown) :] for found in markdown), caption
    assert len(markdown) == len(html.tables) + bool(whole.absent)


def test_the_same_records_make_the_same_page(whole: Page, drawn: str, tmp_path: Path) -> None:
    digest = put_bundle(tmp_path / "bundle")
    again = page_of(tmp_path / "bundle", *every_record(tmp_path, digest))
    assert html_page(again) == drawn
    assert markdown_page(again) == markdown_page(whole)


def test_a_page_needs_nothing_but_itself(drawn: str) -> None:
    text = drawn
    assert Tables(text).elements.count("svg") == 11
    assert "<script" not in text
    # What is named by an address is no more than a namespace.
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', text)) == {"data:,"}
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'(?:href="#|url\(#)([^")]*)', text))
    assert named <= set(ids)
    labels = re.findall(r'aria-labelledby="([^"]*)"', text)
    assert {one for label in labels for one in label.split()} <= set(ids)


HOSTILE = "<script>alert(1)</script>|`*_$x$ & \"'"


def test_text_of_records_is_text(tmp_path: Path) -> None:
    put_bundle(tmp_path / "bundle", (HOSTILE,))
    failed = check(HOSTILE, "failed", HOSTILE)
    result = quantization()
    result["quantization"]["layers"][0]["name"] = f"model.layers.0.{HOSTILE.replace('.', '')}"
    rude = latency()
    rude["tpot"][0]["format"] = HOSTILE
    page = page_of(
        tmp_path / "bundle",
        put(tmp_path / "v.json", "verdict", verdict(None, failed), command=HOSTILE),
        put(tmp_path / "s.json", "scorecard", scorecard(warnings=[HOSTILE])),
        put(tmp_path / "q.json", "quantization", result, {"name": HOSTILE}),
        put(tmp_path / "l.json", "latency", rude, hardware={"accelerator": HOSTILE}),
        put(
            tmp_path / "b.json",
            "bench",
            bench(HOSTILE, tasks=[HOSTILE], complete=False, missing=[HOSTILE]),
        ),
    )
    text = html_page(page)
    assert "<script" not in text
    assert "alert(1)" in text
    read = Tables(text)
    assert "script" not in read.elements
    assert HOSTILE in "".join(read.text)
    assert read.tables["Tasks; loss in nats a token of held-back answers"][1][0] == HOSTILE
    markdown = markdown_page(page)
    assert "<script" not in markdown
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\|\`\*" in markdown


def test_markdown_is_not_broken_by_what_it_shows() -> None:
    assert plain("a|b\n# c") == r"a\|b # c"
    assert plain("q_proj and _x_") == r"q_proj and \_x\_"
    assert plain("[a](b) <i> & \\") == r"\[a\](b) &lt;i&gt; &amp; \\"


def test_a_run_that_never_became_steady_is_said(tmp_path: Path) -> None:
    result = bench("sun")
    result["points"][3]["runs"][0]["steady"] = False
    section = section_of(put(tmp_path / "b.json", "bench", result), title="Under load")
    assert notices(section) == ["Not steady: sun, 2 requests/s, Zipf alpha 1: 1 of 2 runs"]


def test_only_numbers_stand_to_the_right() -> None:
    table = Table(
        "A table",
        ("", "figure", "with an interval", "digest", "words"),
        (("1", "-2.5", "100 (90 to 110)", "9a" * 32, "2"), ("2", "", "not recorded", "b", "x")),
    )
    assert table.numeric == (False, True, True, False, False)


@pytest.mark.parametrize(("weights", "said"), [("bad", 1), (None, 0)])
def test_a_quantization_of_another_module_is_said(
    tmp_path: Path, weights: str | None, said: int
) -> None:
    put_bundle(tmp_path / "bundle")
    digest = weights or sha256_file(tmp_path / "bundle/decode/model.safetensors")
    result = quantization() | {"files": {"model.safetensors": digest, "config.json": "c"}}
    path = put(tmp_path / "q.json", "quantization", result)
    section = section_of(tmp_path / "bundle", path, title="Quantization")
    assert [one.partition(":")[0] for one in notices(section)] == ["Another module"] * said


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"{name}/bench.json", "bench", bench(name)) for name in ("sun", "qsun")]
    names = [source.name for source in section_of(*paths, title="Under load").sources]
    assert names == ["sun/bench.json", "qsun/bench.json"]
