"""qsun's test sets as lm-eval's tasks: the prompts that modules are tuned on, by either command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from qsun.chats import encode_prompts
from qsun.cli import lm_eval as command
from qsun.evaluate.lm import TwoModules
from qsun.evaluate.pair import Pair
from qsun.evaluate.test_sets import generation_task, judge
from qsun.handoff import Boundary
from qsun.models import load_tokenizer
from qsun.tasks.definition import load_task
from qsun.tasks.examples import Example, read_tests
from tests.builders import CHAT_TEMPLATE, tiny_tokenizer
from tests.evaluating import evaluated, responses, verified_bundle, write_definitions
from tests.lm_eval_tasks import asked, hurried
from tests.reference import frozen

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "calib" / "lm_eval"
FILES = sorted(path.stem for path in SHIPPED.glob("qsun_*.yaml"))
READ = 12  # rows of each test set


@pytest.fixture(autouse=True, scope="module")
def _hurried() -> Iterator[None]:
    with hurried():
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return verified_bundle(tmp_path_factory.mktemp("commands") / "tiny")


@cache
def examples_of(definition: Path) -> dict[str, list[Example]]:
    return read_tests(load_task(definition), definition.parent)


def prompts_read(tokenizer: Any, task: Any) -> list[list[int]]:
    """The token ids that reach the prefill module, in the order of rows."""
    model = frozen("llama-gqa")
    lm: Any = TwoModules(Pair(model, model, tokenizer, Boundary.BEFORE_LAST, 2048), 4)
    order: list[list[int]] = []

    def respond(prompts: list[list[int]], _sampling: Any) -> list[list[int]]:
        order.extend(prompts)
        return [[tokenizer.eos_token_id] for _ in prompts]

    lm._responses = respond
    asked(lm, task, READ)
    return order


def expected_prompts(tokenizer: Any, examples: list[Example]) -> list[list[int]]:
    chosen = [(one.messages, one.source) for one in examples[:READ]]
    return encode_prompts(chosen, tokenizer)


def shipped(name: str) -> dict[str, Any]:
    """A shipped task's settings, without what it shares with the others."""
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_task_asks_what_modules_are_tuned_on(
    name: str, smollm2_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    dataset = shipped(name)["dataset_kwargs"]
    examples = examples_of(ROOT / dataset["definition"])
    monkeypatch.setattr("qsun.evaluate.test_sets.read_tests", lambda _task, _at: examples)
    arguments = {"pretrained": str(smollm2_base)}
    manager = TaskManager(include_path=str(SHIPPED), include_defaults=False, metadata=arguments)
    (task,) = manager.load([name])["tasks"].values()
    assert len(task.eval_docs) == len(examples[dataset["test"]])
    tokenizer = load_tokenizer(smollm2_base)
    read = prompts_read(tokenizer, task)
    expected = expected_prompts(tokenizer, examples[dataset["test"]])
    assert len(expected) == READ
    assert sorted(read) == sorted(expected)


def test_every_test_set_is_shipped_as_a_task_with_its_definitions_limits() -> None:
    found = set()
    for name in FILES:
        task = shipped(name)
        definition, test = task["dataset_kwargs"]["definition"], task["dataset_kwargs"]["test"]
        found.add((definition, test))
        defined = load_task(ROOT / definition)
        assert task["task"] == name == f"qsun_{defined.name}_{test.replace('-', '_')}"
        assert task["generation_kwargs"] == {
            "until": list(defined.stop),
            "max_gen_toks": defined.max_new_tokens,
            "do_sample": False,
        }
    assert found == {
        (f"calib/tasks/{name}.yaml", source.name)
        for name in ("math", "tools", "code")
        for source in load_task(ROOT / "calib" / "tasks" / f"{name}.yaml").tests
    }


# The tiny tokenizer begins plain text with a special token, as Llama's does.
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_special_tokens_come_once_whoever_writes_them(template: str | None, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_definitions(tmp_path / "tasks")
    definition = tmp_path / "tasks" / "math.yaml"
    task = generation_task("math.sums", definition, "sums", tmp_path / "tokenizer")
    read = prompts_read(load_tokenizer(tmp_path / "tokenizer"), task)
    expected = expected_prompts(tokenizer, examples_of(definition)["sums"])
    assert sorted(read) == sorted(expected)
    assert {tuple(tokens).count(0) for tokens in read} == {1}


def test_a_checker_judges_and_says_what_no_answer_could_be() -> None:
    row = {"checker": "final-number", "answer": "42"}
    assert judge(row, ["She has #### 42"]) == {"accuracy": 1.0, "invalid": 0.0}
    assert judge(row, ["She has #### 41"]) == {"accuracy": 0.0, "invalid": 0.0}
    assert judge(row, ["I do not know"]) == {"accuracy": 0.0, "invalid": 1.0}
    calls = {"checker": "function-calls", "answer": "{}"}
    assert judge(calls, ["no calls"])["invalid"] == 1.0


def own_file(folder: Path, bundle: Path) -> Path:
    """A task's YAML file as a user writes it, on a bundle's own definition."""
    path = folder / "mine.yaml"
    definition = bundle / "verification" / "math.yaml"
    path.write_text(
        f"include: {SHIPPED / '_generation.yaml'}\n"
        "task: mine\n"
        f"dataset_kwargs: {{definition: {definition}, test: sums}}\n"
        "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}\n",
        encoding="utf-8",
    )
    return path


def said(folder: Path) -> list[str]:
    """The responses among samples that lm-eval's command wrote."""
    (path,) = folder.rglob("samples_mine_*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["filtered_resps"][0] for row in sorted(rows, key=lambda row: row["doc_id"])]


@pytest.fixture(scope="module")
def expected(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `qsun evaluate` hears."""
    out = tmp_path_factory.mktemp("expected") / "out"
    evaluated(bundle, "--tasks", "math.sums", "--systems", "qsun", out=out)
    return responses(out, "qsun")


def options(bundle: Path, folder: Path) -> list[str]:
    return [
        *("run", "--model", "qsun", "--model_args", f"bundle={bundle},task=math"),
        *("--batch_size", "32"),
        *("--tasks", str(own_file(folder, bundle))),
        *("--output_path", str(folder / "results"), "--log_samples"),
    ]


def test_lm_evals_own_command_finds_the_model_through_the_tasks_file(
    bundle: Path, expected: list[str], tmp_path: Path
) -> None:
    lm_eval = Path(sys.executable).with_name("lm_eval")
    done = subprocess.run(
        [lm_eval, *options(bundle, tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert said(tmp_path / "results") == expected


def test_qsuns_own_command_is_the_same_and_ends_with_a_message(
    bundle: Path,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(whole, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["qsun-lm-eval", *options(bundle, tmp_path)])
    command.main()
    assert said(tmp_path / "results") == expected
    wrong = [one.replace("task=math", "task=maths") for one in options(bundle, tmp_path)]
    monkeypatch.setattr(sys, "argv", ["qsun-lm-eval", *wrong])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 3
    assert "has no task 'maths' (did you mean math?)" in capsys.readouterr().err
