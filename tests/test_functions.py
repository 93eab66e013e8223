"""Functions are gathered from source files alone, of packages whose licence allows it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsun.errors import DataError
from qsun.functions import gather_functions

SOURCE = '''
"""A module."""
raise RuntimeError("imported")
import functools

def shown(a: int, b: str = "x") -> int:
    """Say what is shown, in a sentence.

    >>> shown(1)
    """
    # A comment of the body.
    one = a

    two = len(b)
    return one + two

@functools.lru_cache(maxsize=4)
def cached(a):
    """Say what is cached, in a sentence."""
    a += 1
    a += 2
    return a

def same(a):
    """Say the same as cached, in a sentence."""
    a += 1
    a += 2
    return a

@app.command
def decorated(a):
    """Say what is decorated, in a sentence."""
    a += 3
    a += 4
    return a

async def awaited(a):
    """Say what is awaited, in a sentence."""
    a += 5
    a += 6
    return a

def undocumented(a):
    a += 7
    a += 8
    return a

def barely(a):
    """Too few."""
    a += 9
    a += 10
    return a

def short(a):
    """Say what is short, in a sentence."""
    a += 11
    return a

class Holder:
    def method(self):
        """Say what a method is, in a sentence."""
        a = 1
        a += 12
        return a
'''
LONG = 'def long(a):\n    """Say what is long, in a sentence."""\n' + "    a += 1\n" * 41


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.syspath_prepend(tmp_path)

    def written(name: str, *metadata: str, **files: str) -> None:
        for path, source in files.items():
            file = tmp_path / name / f"{path.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        (tmp_path / name / "__init__.py").touch()
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "top_level.txt").write_text(name)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n" + "\n".join(metadata))

    return written


def test_documented_functions_become_prompts_and_bodies(install: Callable[..., None]) -> None:
    install("granted", "License-Expression: MIT", module=SOURCE, long=LONG)
    rows = gather_functions(["granted"])
    assert [row["name"] for row in rows] == ["shown", "cached"]
    assert rows[0] == {
        "name": "shown",
        "package": "granted",
        "licence": "MIT",
        "prompt": 'def shown(a: int, b: str = "x") -> int:\n'
        '    """Say what is shown, in a sentence.\n\n    >>> shown(1)\n    """\n',
        "body": "    # A comment of the body.\n    one = a\n\n    two = len(b)\n"
        "    return one + two\n",
    }
    assert "granted.module" not in sys.modules


def test_tests_and_files_that_are_no_python_are_left_out(install: Callable[..., None]) -> None:
    one = SOURCE.replace("shown", "found").replace("one = a", "one = -a")
    install("granted", "License-Expression: MIT", tests__a=SOURCE, test_b=SOURCE, c="{{", d=one)
    assert [row["name"] for row in gather_functions(["granted"])] == ["found", "cached"]


@pytest.mark.parametrize(
    ("lines", "granted"),
    [
        (["License-Expression: BSD-3-Clause AND (MIT OR Apache-2.0 WITH LLVM-exception)"], True),
        (["License: BSD"], True),
        (["License: long text", "Classifier: License :: OSI Approved :: MIT License"], True),
        (["License: PSF-2.0\n        and more of its text"], True),
        (["License-Expression: GPL-3.0-or-later"], False),
        (["License-Expression: MIT AND GPL-3.0-only"], False),
        (["License: MPL-2.0 AND MIT"], False),
        (["License: MIT", "Classifier: License :: OSI Approved :: GNU Affero GPL v3"], False),
        (["License: PROMIT"], False),
        ([], False),
    ],
)
def test_only_permissive_licences_are_taken(
    install: Callable[..., None], lines: list[str], granted: bool
) -> None:
    install("other", *lines, module=SOURCE)
    if granted:
        assert gather_functions(["other"])
    else:
        with pytest.raises(DataError, match=r"functions of other \(.+\): the licence is not"):
            gather_functions(["other"])


def test_packages_that_are_missing_are_all_named() -> None:
    with pytest.raises(DataError, match="no_such_one, no_such_two: not installed"):
        gather_functions(["no_such_one", "packaging", "no_such_two"])


def test_real_packages_give_python_in_the_same_order() -> None:
    packages = ["jinja2", "packaging", "six"]
    rows: list[dict[str, Any]] = gather_functions(packages)
    assert len(rows) > 100
    assert rows == gather_functions(packages)
    assert {row["package"] for row in rows} == set(packages)
    for row in rows:
        (function,) = ast.parse(row["prompt"] + row["body"]).body
        assert isinstance(function, ast.FunctionDef)
        assert function.name == row["name"]
