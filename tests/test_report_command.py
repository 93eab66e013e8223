"""`qsun report`: what it writes, and all that it refuses before it has written anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import qsun.report.run
from qsun.report.markdown import plain
from qsun.report.needs import NEEDS
from tests.command import Outcome, run_qsun
from tests.reports import (
    OTHER_BUNDLE,
    bench,
    fleet,
    kernel_times,
    latency,
    put,
    put_bundle,
    quantization,
    scorecard,
    verdict,
)

ROOT = Path(__file__).parent.parent
EXAMPLE = (
    "docs/records/smollm2-135m-bundle",
    "docs/records/smollm2-135m-verdict.json",
    "docs/records/smollm2-135m-scorecard.json",
    "docs/records/smollm2-135m-w4.json",
    "docs/records/decode-tpot.json",
    *(f"docs/records/loads/bench-{system}.json" for system in ("isolated", "sun", "qsun")),
    *(f"docs/records/loads/{name}.json" for name in ("latency-sun", "latency-qsun", "fleet")),
)

GPU_EXAMPLE = (
    *(
        f"docs/records/loads-gpu/{system}-alpha-{alpha}.json"
        for system in ("isolated-4", "sun-1", "qsun-1")
        for alpha in range(4)
    ),
    "docs/records/decode-tpot.json",
    *(f"docs/records/loads-gpu/{name}.json" for name in ("latency-sun", "latency-qsun", "fleet")),
)
GPU_NOTE = (
    "All decode workers of a system and its prefill worker share one GPU. "
    "Weights are random, of Llama-3.1-8B's shape."
)


def refused(folder: Path, exit_code: int, *arguments: str | Path) -> str:
    """Run `qsun report`, which must end with `exit_code` and write nothing; gives its message."""
    before = sorted(folder.rglob("*"))
    outcome = run_qsun("report", *arguments, "--out", folder / "page.html")
    assert outcome.exit_code == exit_code, outcome.stderr
    assert outcome.stdout == ""
    assert sorted(folder.rglob("*")) == before
    return outcome.message


def written(*arguments: str | Path) -> Outcome:
    outcome = run_qsun("report", *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    return outcome


def test_a_page_in_both_formats(tmp_path: Path) -> None:
    record = put(tmp_path / "v.json", "verdict", verdict())
    html, markdown = tmp_path / "page.html", tmp_path / "page.md"
    outcome = written(record, "--out", html, "--markdown", markdown)
    assert "Verdict: COMPATIBLE, 2 of 2 checks passed\n" in outcome.stdout
    assert "not recorded: the scorecard (qsun evaluate BUNDLE" in outcome.stdout
    assert outcome.stdout.endswith(f"written to {html}, {markdown}\n")
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert markdown.read_text().startswith("# Report of 1 records\n")
    assert sorted(tmp_path.iterdir()) == sorted([html, markdown, record])


def test_the_outs_suffix_is_its_format(tmp_path: Path) -> None:
    record = put(tmp_path / "v.json", "verdict", verdict())
    outcome = written(record, "--out", tmp_path / "page.md", "--json")
    found = json.loads(outcome.stdout)
    assert found["written"] == [str(tmp_path / "page.md")]
    assert found["sections"] == {"Verdict": "COMPATIBLE, 2 of 2 checks passed"}
    assert (tmp_path / "page.md").read_text().startswith("# Report")


def test_a_bundle_may_hold_its_own_report(tmp_path: Path) -> None:
    from qsun.bundle import read_bundle
    from qsun.verify.static.bundle_files import _later

    put_bundle(tmp_path)
    written(tmp_path, "--out", tmp_path / "records/report.html")
    unlisted = set(map(str, (tmp_path / "records").iterdir())) - {
        str(tmp_path / name) for name in read_bundle(tmp_path).manifest.files
    }
    assert unlisted == {str(tmp_path / "records/report.html")}
    assert _later("records/report.html")


def test_a_record_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    digest = put_bundle(tmp_path / "bundle")
    record = put(tmp_path / "bundle/records/verdict.json", "verdict", verdict(digest))
    outcome = written(tmp_path / "bundle", record, "--out", tmp_path / "page.md")
    assert "Verdict: COMPATIBLE, 2 of 2 checks passed\n" in outcome.stdout


def test_no_path_of_this_machine_is_in_the_page(tmp_path: Path) -> None:
    put_bundle(tmp_path / "bundle")
    record = put(tmp_path / "b.json", "bench", bench("sun"))
    written(tmp_path / "bundle", record, "--out", tmp_path / "page.html")
    assert str(tmp_path) not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say where the page goes"),
        (["--out", "a.md", "--markdown", "a.md"], "are the same file"),
        (["--markdown", "a.html"], "ends with .md"),
    ],
)
def test_a_command_line_that_means_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_qsun("report", put(tmp_path / "v.json", "verdict", verdict()), *options)
    assert outcome.exit_code == 2
    assert said in outcome.stderr


def test_outs_that_cannot_be_written_are_all_named(tmp_path: Path) -> None:
    record = put(tmp_path / "v.json", "verdict", verdict())
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    missing = tmp_path / "no" / "page.md"
    outcome = run_qsun("report", record, "--out", taken, "--markdown", missing)
    assert outcome.exit_code == 7
    assert f"{taken} already exists: choose another name" in outcome.message
    assert f"{missing.parent} is no folder: make it" in outcome.message
    assert taken.read_text() == "mine"
    outcome = run_qsun("report", record, "--out", tmp_path / "page.pdf")
    assert outcome.exit_code == 7
    assert "page.pdf: a report is written as .html, .htm, .md" in outcome.message


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    message = refused(
        tmp_path,
        1,
        tmp_path / "text.json",
        tmp_path / "empty.json",
        tmp_path / "list.json",
        tmp_path / "none.json",
        put(tmp_path / "old.json", "verdict", verdict(), schema=99),
        put(tmp_path / "tuning.json", "tuning", {}),
        put(tmp_path / "nothing.json", "verdict", {}),
    )
    for name in ("text", "empty", "list", "none"):
        assert f"{tmp_path / name}.json is not a qsun record" in message
    assert "give a bundle's folder, or files of records" in message
    assert "old.json: has schema 99, this qsun reads schema 1: make it again by" in message
    assert "tuning.json: is of the kind tuning, which no report shows: verdict, scor" in message
    assert "nothing.json: result.bundle is missing" in message
    assert "result.checks is missing: make the record again" in message


RESULTS: dict[str, dict[str, Any]] = {
    "verdict": verdict(),
    "scorecard": scorecard(),
    "quantization": quantization(),
    "latency": latency(),
    "decode-tpot": kernel_times(),
    "bench": bench("sun"),
    "simulation": fleet(),
}


def needed() -> list[tuple[str, str]]:
    """Every key that a kind of record must have."""
    return [
        (kind, path)
        for kind, needs in NEEDS.items()
        for path in needs
        if not path.split(".")[-1].endswith("?") and path[-1] not in "]}"
    ]


def without(value: Any, parts: list[str]) -> Any:
    """A copy without a key, in the first entry of every list and mapping on the way."""
    key = parts[0].removesuffix("?")
    if key[0] in "[{":
        if isinstance(value, list):
            return [without(value[0], parts[1:]), *value[1:]]
        first = next(iter(value))
        return value | {first: without(value[first], parts[1:])}
    if len(parts) == 1:
        return {name: one for name, one in value.items() if name != key}
    return value | {key: without(value[key], parts[1:])}


@pytest.mark.parametrize(("kind", "path"), needed())
def test_a_missing_key_is_named(tmp_path: Path, kind: str, path: str) -> None:
    result = RESULTS[kind]
    if "floors?" in path:
        floor = {"system": "qsun", "test": "math.seen", "accuracy": 0.5}
        result = result | {"floors": [floor]}
    if path.startswith("tpot?"):
        result = result | {"tpot": {"by_streams": [{"streams": 1, "base_s": 1, "decode_s": 1}]}}
    record = put(tmp_path / "r.json", kind, without(result, path.split(".")))
    message = refused(tmp_path, 1, record)
    assert f"{path.split('.')[-1]} is missing" in message
    assert "make the record again" in message


@pytest.mark.parametrize(
    ("kind", "result", "said"),
    [
        ("verdict", verdict() | {"checks": []}, "result.checks is empty"),
        ("latency", latency() | {"tpot": []}, "result.tpot is empty"),
        ("latency", latency() | {"tpot": {}}, "result.tpot is not a list"),
        ("scorecard", scorecard() | {"systems": {}}, "result.systems is empty"),
        ("scorecard", scorecard() | {"systems": {"a": 3}}, "result.systems[a] is not a mapping"),
        ("quantization", {"quantization": {"layers": []}}, "result.quantization.layers is empty"),
        ("bench", bench("sun") | {"points": 3}, "result.points is not a list"),
        ("bench", bench("sun") | {"complete": "yes"}, "result.complete is not true or false"),
        ("bench", bench("sun") | {"workers": {"prefill": 1, "decode": float("nan")}}, "a number"),
    ],
)
def test_a_result_of_another_shape_is_named(
    tmp_path: Path, kind: str, result: dict[str, Any], said: str
) -> None:
    path = put(tmp_path / "r.json", kind, RESULTS[kind])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"result": result}))
    assert said in refused(tmp_path, 1, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"result": None}, "result is not a mapping"),
        ({"versions": {"torch": 2}}, "versions[torch] is not text"),
        ({"command": None}, "command is not text"),
        ({"kind": ["verdict"]}, "is of the kind ['verdict']"),
    ],
)
def test_a_record_without_provenance_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = put(tmp_path / "r.json", "verdict", verdict())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert said in refused(tmp_path, 1, path)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path, 11, tmp_path / "empty", tmp_path / "none.json")
    assert f"{tmp_path / 'empty'} is no bundle: it has no bundle.json" in message
    assert "none.json is not a qsun record" in message


def test_one_bundle_is_enough(tmp_path: Path) -> None:
    put_bundle(tmp_path / "a")
    put_bundle(tmp_path / "b")
    message = refused(tmp_path, 11, tmp_path / "a", tmp_path / "b")
    assert f"{tmp_path / 'b'} is a second bundle beside {tmp_path / 'a'}" in message


def test_a_record_that_was_changed_in_its_bundle_is_refused(tmp_path: Path) -> None:
    put_bundle(tmp_path / "bundle")
    put(tmp_path / "bundle/records/quantization.json", "quantization", quantization())
    message = refused(tmp_path, 11, tmp_path / "bundle")
    assert "quantization.json was changed after bundle.json was written" in message


@pytest.mark.parametrize(
    ("kind", "result"), [("verdict", verdict(OTHER_BUNDLE)), ("scorecard", scorecard(OTHER_BUNDLE))]
)
@pytest.mark.parametrize("inside", [True, False])
def test_another_bundles_verdict_or_scorecard_is_refused(
    tmp_path: Path, kind: str, result: dict[str, Any], inside: bool
) -> None:
    digest = put_bundle(tmp_path / "bundle")
    folder = tmp_path / "bundle/records" if inside else tmp_path
    path = put(folder / f"{kind}.json", kind, result)
    message = refused(tmp_path, 11, tmp_path / "bundle", *([] if inside else [path]))
    assert f"{kind}.json is the {kind} of another bundle ({OTHER_BUNDLE}), not of" in message
    assert digest in message


def test_a_page_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = put(tmp_path / "v.json", "verdict", verdict())

    def broken(_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setitem(qsun.report.run.WRITERS, ".md", broken)
    with pytest.raises(ZeroDivisionError):
        run_qsun("report", record, "--out", tmp_path / "a.html", "--markdown", tmp_path / "b.md")
    assert sorted(tmp_path.iterdir()) == [record]


@pytest.mark.parametrize("record", sorted((ROOT / "docs/records").glob("smollm2-135m-w?.json")))
def test_real_quantizations_are_shown(record: Path, tmp_path: Path) -> None:
    written(record, "--out", tmp_path / "page.md")


@pytest.mark.parametrize("suffix", [".html", ".md"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("example-report", EXAMPLE), ("gpu-report", (*GPU_EXAMPLE, "--note", GPU_NOTE))],
)
def test_the_examples_are_the_commands(
    name: str,
    arguments: tuple[str, ...],
    suffix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    page = tmp_path / f"page{suffix}"
    written(*arguments, "--out", page)
    assert page.read_text() == Path(f"docs/{name}{suffix}").read_text()


def test_a_note_is_said_first_and_is_only_text(tmp_path: Path) -> None:
    record = put(tmp_path / "records/bench.json", "bench", bench("sun"))
    pages = [tmp_path / "page.html", tmp_path / "page.md"]
    note = "All on <one> GPU | *mine*"
    written(record, "--note", note, "--out", pages[0], "--markdown", pages[1])
    html, markdown = (page.read_text() for page in pages)
    assert "<p>All on &lt;one&gt; GPU | *mine*</p>" in html.partition("<nav")[0]
    assert f"\n\n{plain(note)}\n" in markdown.partition("\n- [")[0]
    assert plain(note) != note


def test_an_installed_wheel_has_the_template(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "qsun").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "qsun").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from setuptools import build_meta; build_meta.build_wheel('.')",
        ],
        cwd=source,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=True,
    )
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"qsun/report/page.html.j2", "qsun/report/page.css"} <= names
    assert "qsun/report/sections/load.py" in names
