"""The seven systems of a config: who reads and who answers, and what is said of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qsun.decode_checkpoint import load_decode, weights_digest
from qsun.evaluate.systems import SYSTEMS
from qsun.generation import Sampling, generate
from qsun.jobs.evaluation_state import digest_of
from qsun.models import load_model, load_tokenizer
from qsun.prefill_module import load_prefill, save_prefill
from tests.builders import tiny_model, write_config
from tests.bundles import write_decode, write_tuning_record
from tests.evaluating import evaluate, evaluated, prompts_in_order, responses, write_definitions
from tests.lm_eval_tasks import hurried
from tests.reference import with_adapter


class Parts(NamedTuple):
    """One task's modules as `qsun tune` and `qsun quantize` leave them."""

    base: Path
    decode: Path
    folders: dict[str, Path]

    def config(self, folder: Path, **changes: Any) -> Path:
        """A config of all modules; `changes` are folders in their place, None for none."""
        chosen = {name: path for name, path in (self.folders | changes).items() if path}
        modules = [{"task": "math"} | {name: str(path) for name, path in chosen.items()}]
        write_definitions(folder)
        return write_config(
            folder,
            self.base,
            tasks=["math.yaml"],
            evaluate__decode=str(self.decode),
            evaluate__modules=modules,
        )


def adapter(base: Path, folder: Path, system: str, seed: int, scale: float, **record: Any) -> Path:
    """A LoRA prefill module tuned as `system`, so its record says."""
    module = with_adapter(load_model(base, "bfloat16"), seed, scale)
    save_prefill(module, folder, torch.bfloat16, "../base")
    write_tuning_record(folder, "lora", {}, **({"system": system} | record))
    return folder


@pytest.fixture(autouse=True, scope="module")
def _hurried() -> Iterator[None]:
    with hurried():
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    base = folder / "base"
    tiny_model(base)
    tiny_model(folder / "full_ft", seed=5)
    write_tuning_record(folder / "full_ft", "full", {}, system="full-ft")
    write_decode(base, folder / "decode", "compressed-tensors")
    write_decode(folder / "full_ft", folder / "awq_full_ft", "awq")
    adapter(base, folder / "sun", "sun", 1, 0.5)
    digest = weights_digest(folder / "decode")
    adapter(base, folder / "qsun", "qsun", 2, 0.5, decode_digest=digest, decode_recipe=None)
    names = ("full_ft", "awq_full_ft", "sun", "qsun")
    return Parts(base, folder / "decode", {name: folder / name for name in names})


def said(parts: Parts, definition: Path, prefill: Path, decode: Path) -> list[str]:
    """What two folders' modules say to the task's prompts, without lm-eval."""
    tokenizer = load_tokenizer(parts.base)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in prompts_in_order(definition)
    ]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    reader = load_decode(decode, "bfloat16")
    writer = reader if prefill == decode else load_prefill(prefill, parts.base, "bfloat16")
    made = generate(writer, reader, tokenizer, prompts, Sampling(6), batch_size=1)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]


def test_each_system_has_its_own_modules_and_answers_with_them(
    parts: Parts, tmp_path: Path
) -> None:
    config, out = parts.config(tmp_path / "run"), tmp_path / "out"
    result = evaluated(config, "--tasks", "math.sums", out=out)
    assert list(result["systems"]["math.sums"]) == list(SYSTEMS)
    assert len(result["pairs"]) == 7 * 6 / 2
    assert result["warnings"] == []
    folders = {"base": parts.base, "decode": parts.decode, **parts.folders}
    digests = {name: digest_of(folder) for name, folder in folders.items()}
    assert len(set(digests.values())) == len(folders)
    assert result["modules"] == {
        f"math, {system}, {part}": digests[field]
        for system, fields in SYSTEMS.items()
        for part, field in zip(("prefill", "decode"), fields, strict=True)
    }
    assert SYSTEMS["naive"] == ("full_ft", "base")
    heard = {}
    for system, (prefill, decode) in SYSTEMS.items():
        heard[system] = responses(out, system)
        expected = said(parts, config.parent / "math.yaml", folders[prefill], folders[decode])
        same = sum(one == other for one, other in zip(heard[system], expected, strict=True))
        assert same >= 7, system  # one row's batch may round a tie another way
    assert len({tuple(texts) for texts in heard.values()}) == len(SYSTEMS)


def test_modules_make_the_systems_that_they_can(parts: Parts, tmp_path: Path) -> None:
    config = parts.config(tmp_path / "run", awq_full_ft=None, qsun=None)
    outcome = evaluate(config, "--dry-run", "--tasks", "math.sums", out=tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    assert "base, full-ft, naive, sun, qsun-post" in outcome.stdout
    chosen = evaluate(config, "--systems", "qsun,awq-full-ft", out=tmp_path / "out")
    assert chosen.exit_code == 3
    assert "task math: qsun needs qsun and decode" in chosen.message
    assert "task math: awq-full-ft needs awq_full_ft" in chosen.message


def test_a_fine_tuned_model_that_is_an_adapter_is_both_modules_of_full_ft(
    parts: Parts, tmp_path: Path
) -> None:
    tuned = adapter(parts.base, tmp_path / "tuned", "full-ft", 9, 0.5)
    config = parts.config(tmp_path / "run", full_ft=tuned, awq_full_ft=None, sun=None, qsun=None)
    options = ("--tasks", "math.sums", "--systems", "full-ft,naive")
    result = evaluated(config, *options, out=tmp_path / "out")
    assert result["modules"]["math, full-ft, decode"] == digest_of(tuned)
    module = load_prefill(tuned, parts.base, "bfloat16")
    merged = tmp_path / "merged"
    module.merge_and_unload().save_pretrained(merged)
    expected = said(parts, config.parent / "math.yaml", merged, merged)
    found = responses(tmp_path / "out", "full-ft")
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 4
    assert responses(tmp_path / "out", "naive") != found


def test_a_prefill_module_that_does_nothing_is_warned_of(parts: Parts, tmp_path: Path) -> None:
    idle = adapter(parts.base, tmp_path / "idle", "sun", 1, 0.0)
    config = parts.config(tmp_path / "run", full_ft=None, awq_full_ft=None, sun=idle)
    outcome = evaluate(config, "--tasks", "math.more", out=tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("WARNING")]
    assert [line.partition(",")[0] for line in lines] == ["WARNING: sun", "WARNING: qsun-post"]
    assert all("writes the cache that an untuned one would: P = D" in line for line in lines)
    assert "WARNING: sun, task math" in outcome.stderr


def test_two_systems_of_one_module_score_the_same(parts: Parts, tmp_path: Path) -> None:
    idle = adapter(parts.base, tmp_path / "idle", "sun", 1, 0.0)
    config = parts.config(tmp_path / "run", full_ft=None, awq_full_ft=None, sun=idle, qsun=None)
    evaluated(config, "--tasks", "math.sums", "--systems", "base,sun", out=tmp_path / "out")
    assert responses(tmp_path / "out", "sun") == responses(tmp_path / "out", "base")
