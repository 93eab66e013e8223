"""Functions: documented Python functions out of the source files of installed packages."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qsun.errors import DataError

BODY_LINES = range(3, 41)  # that are not blank
PROMPT_LINES = 60  # at most: reference manuals in docstrings are longer
SENTENCE_WORDS = 4
# They change how a function is called or found, not what its body says.
HARMLESS_DECORATORS = {
    *("staticmethod", "cache", "lru_cache", "cacheit", "public", "set_module"),
    *("_dispatchable", "array_function_dispatch", "not_implemented_for"),
    *("py_random_state", "np_random_state"),
}
TEST_FOLDERS = {"test", "tests", "testing", "_testing"}
# Each part of what a distribution says of its licence must name one of these.
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|Zlib|CC0|BSL-1\.0"
    r"|HPND|LLVM-exception)\b"
)
LICENCE_PARTS = re.compile(r"\b(?:AND|OR|WITH)\b|[();]")


def gather_functions(packages: Sequence[str]) -> list[dict[str, Any]]:
    """Every documented top-level function of the packages, as a prompt and its continuation.

    Rows have `name`, `package`, `licence`, `prompt` (the source from `def` to the docstring's end)
    and `body` (the rest of it). Packages are read, never imported; tests among their modules and
    bodies seen before are left out.

    Raises:
        DataError: packages that are not installed, or whose licence is not known as permissive.
    """
    licences = _licences(packages)
    rows: dict[str, dict[str, Any]] = {}
    for package, licence in licences.items():
        for path in _files(package):
            for row in _functions(path):
                origin = {"package": package, "licence": licence}
                rows.setdefault(row["body"].strip(), row | origin)
    return list(rows.values())


def _licences(packages: Sequence[str]) -> dict[str, str]:
    distributions = metadata.packages_distributions()
    installed = {package: distributions.get(package, []) for package in packages}
    missing = [package for package, names in installed.items() if not names]
    if missing:
        raise DataError(
            f"functions of {', '.join(missing)}: not installed; pip install what provides them, "
            "or take them out of the source's packages"
        )
    licences = {
        package: " AND ".join(sorted({_licence(name) for name in names}))
        for package, names in installed.items()
    }
    refused = [name for name, licence in licences.items() if not _is_permissive(licence)]
    if refused:
        stated = ", ".join(f"{name} ({licences[name] or 'none stated'})" for name in refused)
        raise DataError(
            f"functions of {stated}: the licence is not known as permissive; take them out of the "
            "source's packages"
        )
    return licences


def _licence(distribution: str) -> str:
    """What its metadata says: an SPDX expression, else its classifiers, else its first words."""
    stated = metadata.metadata(distribution)
    classifiers = stated.get_all("Classifier") or []
    approved = [entry for entry in classifiers if entry.startswith("License ::")]
    names = " AND ".join(entry.rpartition(" :: ")[2] for entry in approved)
    free_text = str(stated["License"] or "").strip().partition("\n")[0]
    return str(stated["License-Expression"] or names or free_text)


def _is_permissive(licence: str) -> bool:
    parts = [part.strip() for part in LICENCE_PARTS.split(licence)]
    return licence != "" and all(PERMISSIVE.search(part) for part in parts if part)


def _files(package: str) -> Iterator[Path]:
    spec = find_spec(package)
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise DataError(f"functions of {package}: it is installed without source files")
    if not spec.submodule_search_locations:
        yield Path(str(spec.origin))
    for folder in map(Path, spec.submodule_search_locations or ()):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if not TEST_FOLDERS & set(parts) and not parts[-1].startswith(("test_", "conftest")):
                yield path


def _functions(path: Path) -> Iterator[dict[str, Any]]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):  # of escapes in the packages' own strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or another language's test data
        return
    lines = source.split("\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _is_plain(node) and _is_documented(node):
            end = _last_line(node.body[0])
            prompt, body = lines[node.lineno - 1 : end], lines[end : _last_line(node)]
            filled = [line for line in body if line.strip()]
            if len(prompt) <= PROMPT_LINES and len(filled) in BODY_LINES:
                yield {
                    "name": node.name,
                    "prompt": "\n".join(prompt) + "\n",
                    "body": "\n".join(body).strip("\n") + "\n",
                }


def _is_plain(node: ast.FunctionDef) -> bool:
    return all(_decorator_name(entry) in HARMLESS_DECORATORS for entry in node.decorator_list)


def _decorator_name(decorator: ast.expr) -> str:
    """The last part of its name: `lru_cache` of `@functools.lru_cache(maxsize=8)`."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called).rpartition(".")[2]


def _is_documented(node: ast.FunctionDef) -> bool:
    documentation = ast.get_docstring(node) or ""
    has_sentence = len(documentation.split()) >= SENTENCE_WORDS and "." in documentation
    # What follows must begin on a line of its own.
    return has_sentence and len(node.body) > 1 and node.body[1].lineno > _last_line(node.body[0])


def _last_line(node: ast.stmt) -> int:
    assert node.end_lineno is not None, "ast.parse gives every statement its last line"
    return node.end_lineno
