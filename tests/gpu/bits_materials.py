"""What `compare_bits` starts from: the base model as a folder, and tasks with their rows at hand.

    python -m tests.gpu.bits_materials base MODEL FOLDER
    python -m tests.gpu.bits_materials task DEFINITION FOLDER [--skip N] [--rows N]
    python -m tests.gpu.bits_materials mix DEFINITION... --out FOLDER [--rows N] [--repeat N]

Each training would else convert the model and fill in 90,000 problems anew. A task's rows are its
definition's own, in its order, without its tests; the tests are 800 of the templates that were
trained on and 320 of those that were not.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qsun.files import publish_folder
from qsun.models import checkpoint_folder, load_tokenizer, locate, read_config, serving_dtype
from qsun.skeleton import skeleton
from qsun.tasks.definition import TaskDefinition, load_task
from qsun.tasks.examples import Example, TaskData, read_task
from tests.builders import tiny_model, write_jsonl

# A fifth of a generator's templates are held out: of so many problems, enough are of either side.
GENERATED = {"seen": 1100, "held-out": 2400}
TESTED = {"seen": 800, "held-out": 320}
TINY = "tiny"
TINY_CONTEXT = 4096  # a small vocabulary makes long rows


@dataclass(frozen=True)
class Limits:
    """What a small model asks to have lowered: tokens of a row, and of an answer."""

    tokens: int
    new_tokens: int


def write_base(model: str, folder: Path) -> None:
    """Write the base model to a new folder, with its tokenizer."""
    with publish_folder(folder) as scratch:
        if model == TINY:
            tiny = tiny_model(scratch)
            tiny.config.max_position_embeddings = TINY_CONTEXT
            tiny.config.save_pretrained(scratch)
            return
        source = locate(model, None, Path())
        config = read_config(source)
        with tempfile.TemporaryDirectory(dir=folder.parent) as converted:
            found = checkpoint_folder(
                source, skeleton(config), Path(converted), serving_dtype(config)
            )
            load_tokenizer(found).save_pretrained(scratch)
            for path in found.iterdir():
                path.rename(scratch / path.name)


def read_rows(path: Path, skip: int, rows: int | None) -> tuple[TaskDefinition, TaskData]:
    """A task with the tests of the comparison, and training rows from `skip` on."""
    task = load_task(path)
    tests = tuple(replace(test, rows=GENERATED.get(test.name, test.rows)) for test in task.tests)
    task = replace(task, tests=tests, test_samples=None)
    data = read_task(task, path.parent, None if rows is None else skip + rows)
    tested = {name: found[: TESTED.get(name)] for name, found in data.tests.items()}
    return task, replace(data, train=data.train[skip:], tests=tested)


def write_task(
    name: str,
    task: TaskDefinition,
    data: TaskData,
    folder: Path,
    limits: Limits,
) -> None:
    """Write `NAME.yaml`, last, beside its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": data.train, "validation": data.validation, **data.tests}
    sources = {split: _write_rows(name, split, found, folder) for split, found in splits.items()}
    sources["train"].pop("answer")
    definition: dict[str, Any] = {
        "name": name,
        "description": task.description,
        "max_tokens": min(limits.tokens, task.max_tokens),
        "max_new_tokens": min(limits.new_tokens, task.max_new_tokens),
        "validation_samples": len(data.validation),
        "train": [sources["train"]],
        "validation": [sources["validation"]],
        "tests": [sources[split] for split in data.tests],
    }
    if task.checker is not None:
        definition["checker"] = task.checker
    unfinished = folder / f".{name}.yaml"
    unfinished.write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf-8")
    unfinished.rename(folder / f"{name}.yaml")


def _write_rows(name: str, split: str, examples: Sequence[Example], folder: Path) -> dict[str, str]:
    rows = []
    for example in examples:
        messages = list(example.messages)
        if example.response:
            messages.append({"role": "assistant", "content": example.response})
        rows.append({"messages": messages, "answer": example.answer})
    path = write_jsonl(folder / f"{name}-{split}.jsonl", rows)
    return {
        "name": split,
        "kind": "jsonl",
        "path": path.name,
        "messages": "messages",
        "answer": "answer",
    }


def write_mix(paths: Sequence[Path], folder: Path, rows: int, repeat: int, limits: Limits) -> None:
    """Write task `mix` without tests: the first task's rows, the others' `repeat` times."""
    train: list[Example] = []
    validation: list[Example] = []
    for number, path in enumerate(paths):
        task, data = read_rows(path, 0, rows)
        train += data.train if number == 0 else data.train * repeat
        validation += data.validation
    task = replace(task, description="all tasks", checker=None)
    data = TaskData(train, validation, {}, 0, {})
    write_task("mix", task, data, folder, limits)


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    base = kinds.add_parser("base")
    base.add_argument("model")
    base.add_argument("folder", type=Path)
    one = kinds.add_parser("task")
    one.add_argument("definition", type=Path)
    one.add_argument("folder", type=Path)
    one.add_argument("--skip", type=int, default=0)
    mix = kinds.add_parser("mix")
    mix.add_argument("definition", type=Path, nargs="+")
    mix.add_argument("--out", type=Path, required=True)
    mix.add_argument("--repeat", type=int, default=4)
    for made in (one, mix):
        made.add_argument("--rows", type=int)
        made.add_argument("--max-tokens", type=int, default=1024)
        made.add_argument("--max-new-tokens", type=int, default=1024)
    asked = parser.parse_args()
    if asked.kind == "base":
        write_base(asked.model, asked.folder)
    elif asked.kind == "task":
        task, data = read_rows(asked.definition, asked.skip, asked.rows)
        limits = Limits(asked.max_tokens, asked.max_new_tokens)
        write_task(asked.definition.stem, task, data, asked.folder, limits)
    else:
        limits = Limits(asked.max_tokens, asked.max_new_tokens)
        write_mix(asked.definition, asked.out, asked.rows, asked.repeat, limits)


if __name__ == "__main__":
    main()
