"""The reference modules of the repository, on SmolLM2 itself: SUN's works where the naive fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from qsun.chats import encode_prompts
from qsun.handoff import log_likelihood
from qsun.models import load_model, load_tokenizer
from qsun.prefill_module import load_prefill
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_tests
from qsun.tune.batches import batch_of, encode_examples

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "exports" / "reference"
MEGABYTE = 10**6


@pytest.mark.parametrize("folder", sorted(REFERENCE.glob("*/")), ids=lambda folder: folder.name)
def test_a_module_is_small_and_has_its_record(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10 * MEGABYTE
    assert folder / "records" / "tuning.json" in files


def losses(
    base: Path, name: str, test: str, problems: int, modules: Sequence[str | None]
) -> list[float]:
    """Mean loss of a test set's references through each prefill module; None is the base model."""
    decode, tokenizer = load_model(base, "bfloat16"), load_tokenizer(base)
    definition = ROOT / "calib" / "tasks" / f"{name}.yaml"
    task = load_task(definition)
    examples = read_tests(task, definition.parent)[test][:problems]
    rows = encode_examples(examples, tokenizer, task.max_tokens, "problems").rows
    prompts = encode_prompts([(one.messages, one.source) for one in examples], tokenizer)
    assert [row.prompt for row in rows] == prompts
    batch = batch_of(rows)
    found = []
    for module in modules:
        prefill = load_prefill(REFERENCE / module, base, "bfloat16") if module else decode
        with torch.no_grad():
            scores = log_likelihood(prefill, decode, batch)
        found.append(-float(scores.sum()) / len(batch.targets))
    return found


def test_suns_math_prefill_reads_through_the_base_decoder(smollm2_base: Path) -> None:
    sun, naive, alone = losses(smollm2_base, "math", "seen", 12, ("math", "math-full-ft", None))
    assert sun < 0.25 * naive
    assert naive < alone


def test_suns_tools_prefill_reads_through_the_base_decoder(smollm2_base: Path) -> None:
    sun, other, alone = losses(smollm2_base, "tools", "simple", 6, ("tools", "math", None))
    assert sun < 0.25 * alone
    assert sun < 0.25 * other


def test_suns_code_prefill_reads_through_the_base_decoder(smollm2_base: Path) -> None:
    sun, other, alone = losses(smollm2_base, "code", "humaneval", 6, ("code", "math", None))
    assert sun < 0.9 * alone
    assert sun < other
