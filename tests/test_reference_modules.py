"""The reference modules of the repository, on SmolLM2 itself: SUN's works where the naive fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qsun.chats import encode_prompts
from qsun.gguf_file import convert_gguf
from qsun.handoff import log_likelihood
from qsun.models import load_model, load_tokenizer
from qsun.prefill_module import load_prefill
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_tests
from qsun.tune.batches import batch_of, encode_examples
from tests.reference import smollm2_file

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "exports" / "reference"
MEGABYTE = 10**6
PROBLEMS = 24


@pytest.mark.parametrize("folder", sorted(REFERENCE.glob("*/")), ids=lambda folder: folder.name)
def test_a_module_is_small_and_has_its_record(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10 * MEGABYTE
    assert folder / "records" / "tuning.json" in files


def test_suns_prefill_reads_through_the_base_decoder(tmp_path: Path) -> None:
    convert_gguf(smollm2_file(), tmp_path / "base", "bfloat16")
    decode, tokenizer = load_model(tmp_path / "base", "bfloat16"), load_tokenizer(tmp_path / "base")
    definition = ROOT / "calib" / "tasks" / "math.yaml"
    task = load_task(definition)
    problems = read_tests(task, definition.parent)["seen"][:PROBLEMS]
    rows = encode_examples(problems, tokenizer, task.max_tokens, "problems").rows
    prompts = encode_prompts([(one.messages, one.source) for one in problems], tokenizer)
    assert [row.prompt for row in rows] == prompts
    batch = batch_of(rows)

    def loss(module: str | None) -> float:
        folder = REFERENCE / str(module)
        prefill = load_prefill(folder, tmp_path / "base", "bfloat16") if module else decode
        with torch.no_grad():
            scores = log_likelihood(prefill, decode, batch)
        return -float(scores.sum()) / len(batch.targets)

    sun, naive, base = loss("math"), loss("math-full-ft"), loss(None)
    assert sun < 0.25 * naive
    assert naive < base
