"""Fixtures of `qsun evaluate` where it refuses: a tiny bundle, and no model may be opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qsun.evaluate import run
from qsun.evaluate.load import Loader
from tests.evaluating import evaluate, verified_bundle
from tests.lm_eval_tasks import hurried

Refused = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def hurry() -> Iterator[None]:
    with hurried():
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return verified_bundle(tmp_path_factory.mktemp("refused") / "tiny")


@pytest.fixture
def bundle(shared: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(shared, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """`qsun evaluate`, which must end so, open no model and leave nothing; gives its message."""

    def opened(*_arguments: Any) -> Any:
        raise AssertionError("a model was opened")

    def call(exit_code: int, subject: Path, *options: str | Path, out: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(Loader, "pair", opened)
            outcome = evaluate(subject, *options, out=out or tmp_path / "new" / "out")
        assert outcome.exit_code == exit_code, outcome.stderr
        assert outcome.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before
        return outcome.message

    return call


def own_task(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any] | list[dict[str, Any]]) -> None:
    """What lm-eval opens by any name of its own, none of which can be had without a network."""

    class Manager:
        all_tasks = all_subtasks = ("own",)

        def __init__(self, manager: Any) -> None:
            self.load = manager.load

    whole = run._manager(False)
    monkeypatch.setattr(run, "_manager", lambda _own: Manager(whole) if _own else whole)
    monkeypatch.setattr("qsun.evaluate.test_sets.TestSet.lm_eval", lambda _self, _folder: found)
