"""The README says what is there: its tree names every module, its table is that of the records."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README_FOLDERS = (
    *("configs", "calib", "exports", "examples"),
    *("docs", "requirements", "tests", "qsun"),
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = README.partition("## The tree")[2]
    named = set(re.findall(r"[a-z_]+\.py", tree.partition("qsun/\n")[2].partition("```")[0]))
    modules = {path.name for path in (ROOT / "qsun").rglob("*.py")} - {"__init__.py"}
    commands = {path.name for path in (ROOT / "qsun" / "cli").glob("*.py")}
    assert modules - commands <= named
    assert named <= modules
    for folder in (path.parent.name for path in (ROOT / "qsun").glob("*/__init__.py")):
        assert f"{folder}/" in tree


def test_the_tree_names_every_top_level_folder() -> None:
    tree = README.partition("## The tree")[2]
    for name in (
        "examples",
        "configs",
        "calib",
        "exports",
        "docs",
        "requirements",
        "tests",
        "qsun",
    ):
        assert (ROOT / name).is_dir()
        assert f"{name}/" in tree


def test_the_tables_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "docs" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.table() in README
    assert script.systems_table.table() in README
    assert script.bits_table.table() in README
    for page in script.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert script.rendered(text) == text
    assert script.tpot_table.table() in (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
