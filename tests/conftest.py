"""What every test shares: quiet libraries, no network, and tiny models made once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from qsun.quiet import quiet_libraries

# All are read when the libraries are imported, so they come before any test does that.
quiet_libraries()
os.environ["HF_HUB_OFFLINE"] = "1"
DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="qsun-tests-")
os.environ["HF_DATASETS_CACHE"] = DATASETS_CACHE.name
# What takes long to make is made once, here, for all processes that start from this environment.
if "QSUN_TESTS_FOLDER" not in os.environ:
    SHARED = tempfile.TemporaryDirectory(prefix="qsun-tests-")
    os.environ["QSUN_TESTS_FOLDER"] = SHARED.name


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint; tests share it and change only copies."""
    from tests.builders import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_module(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decode module that `qsun quantize` makes of `tiny_folder`; change only copies."""
    from tests.builders import write_config
    from tests.command import run_qsun

    folder = tmp_path_factory.mktemp("modules")
    outcome = run_qsun(
        "quantize", write_config(folder / "run", tiny_folder), "--out", folder / "tiny"
    )
    assert outcome.exit_code == 0, outcome.stderr
    return folder / "tiny"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a tiny bundle, whose chats may have tools; tests only read it."""
    from tests.serving_tokenizer import serving_tokenizer

    return serving_tokenizer(tmp_path_factory.mktemp("serving") / "tokenizer")


@pytest.fixture(scope="session")
def smollm2_base() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder; tests only read it."""
    from tests.reference import smollm2_folder

    return smollm2_folder()
