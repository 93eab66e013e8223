"""`qsun evaluate --served`: the router's real workers answer as both modules in this process do."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from qsun.bundle import Bundle, read_bundle, write_manifest
from qsun.chats import encode_prompts
from qsun.errors import DataError
from qsun.evaluate.routed import RoutedModules
from qsun.evaluate.samples import Samples, read_samples
from qsun.models import load_tokenizer
from qsun.tasks.definition import load_task
from qsun.tasks.examples import Example, read_tests
from qsun.tasks.function_calls import makes_calls
from qsun.verify.served.in_process import InProcess
from tests.bundles import write_passed_verdict
from tests.command import Outcome, run_qsun
from tests.evaluating import QUICK
from tests.lm_eval_tasks import asked, hurried, local_task
from tests.served.conftest import TASKS, TIE_NATS
from tests.serving import Serving

LIMIT = 6
FEW = 40  # generated problems, not thousands
SHORT = 16  # tokens of an answer: the definitions' hundreds would take minutes here
TESTS = {"math": "held-out", "tools": "simple"}


@pytest.fixture(autouse=True, scope="module")
def _hurried() -> Iterator[None]:
    with hurried():
        yield


@pytest.fixture(scope="module")
def short(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The served bundle, linked, whose definitions ask for short answers."""
    folder = tmp_path_factory.mktemp("short") / "bundle"
    shutil.copytree(bundle.folder, folder, copy_function=os.link)
    for task in TASKS:
        path = folder / "verification" / f"{task}.yaml"
        text, limit = path.read_text(encoding="utf-8"), load_task(path).max_new_tokens
        path.unlink()
        changed = text.replace(f"max_new_tokens: {limit}", f"max_new_tokens: {SHORT}")
        changed = re.sub(r"rows: \d+", f"rows: {FEW}", changed)
        path.write_text(changed, encoding="utf-8")
        assert load_task(path).max_new_tokens == SHORT
    return read_bundle(folder)


@pytest.fixture(scope="module")
def examples(short: Bundle) -> dict[str, list[Example]]:
    found = {}
    for task, test in TESTS.items():
        definition = short.folder / "verification" / f"{task}.yaml"
        found[task] = read_tests(load_task(definition), definition.parent)[test][:LIMIT]
    return found


def evaluate(bundle: Bundle, out: Path, *options: str) -> Outcome:
    tests = ",".join(f"{task}.{test}" for task, test in TESTS.items())
    chosen = ("--tasks", tests, "--limit", str(LIMIT), "--out", out, *QUICK)
    return run_qsun("evaluate", bundle.folder, *chosen, *options)


def samples(out: Path, system: str, task: str) -> Samples:
    name = f"{system}--{task}.{TESTS[task]}.jsonl.gz"
    return read_samples(out / "records" / "scorecard" / name)


@pytest.fixture(scope="module")
def own(short: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of the modules in this process."""
    out = tmp_path_factory.mktemp("in-process") / "out"
    outcome = evaluate(short, out, "--systems", "qsun-post")
    assert outcome.exit_code == 0, outcome.stderr
    return out


@pytest.fixture(scope="module")
def routed(short: Bundle, served: Serving, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the router."""
    out = tmp_path_factory.mktemp("routed") / "out"
    outcome = evaluate(short, out, "--served", served.url)
    assert outcome.exit_code == 0, outcome.stderr
    return out


def test_another_bundle_with_the_same_tasks_is_refused(
    short: Bundle, served: Serving, tmp_path: Path
) -> None:
    folder = shutil.copytree(short.folder, tmp_path / "other", copy_function=os.link)
    write_manifest(folder, replace(short.manifest, created="later"))
    write_passed_verdict(folder)
    other = read_bundle(folder)
    outcome = evaluate(other, tmp_path / "out", "--served", served.url)
    assert outcome.exit_code == 3, outcome.stderr
    assert f"bundle {other.digest}:" in outcome.message
    for task in TASKS:
        assert f"- {task}: bundle {short.digest}" in outcome.message
    assert read_bundle(short.folder).digest == short.digest


def answered(lm: RoutedModules, texts: list[str]) -> list[str]:
    chosen = {"until": [], "max_gen_toks": SHORT, "do_sample": False}
    requests = [Instance("", {}, (text, chosen), index) for index, text in enumerate(texts)]
    return lm.generate_until(requests)


def test_log_likelihoods_are_refused_by_a_router(
    bundle: Bundle, served: Serving, tmp_path: Path
) -> None:
    lm: Any = RoutedModules(str(bundle.folder), "math", served.url)
    for output_type in ("multiple_choice", "loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(DataError, match="a router gives no log-likelihoods of prompts"):
            asked(lm, local_task(output_type))


def test_a_generation_task_of_lm_evals_goes_through_the_router(
    bundle: Bundle, served: Serving
) -> None:
    lm: Any = RoutedModules(str(bundle.folder), "math", served.url)
    _, found = asked(lm, local_task("generate_until"), 2)
    assert all("\n" not in one[0][0] and "." not in one[0][0] for one in found)


@pytest.mark.parametrize("task", TASKS)
def test_the_router_answers_as_the_modules_in_this_process(
    own: Path,
    routed: Path,
    bundle: Bundle,
    in_process: InProcess,
    examples: dict[str, list[Example]],
    task: str,
) -> None:
    here, there = samples(own, "qsun-post", task), samples(routed, "qsun-post", task)
    assert here.digest == there.digest
    assert len(here.rows) == len(there.rows) == LIMIT
    tokenizer = load_tokenizer(bundle.tokenizer)
    prompts = encode_prompts([(one.messages, one.source) for one in examples[task]], tokenizer)
    same = 0
    for prompt, *both in zip(prompts, here.rows, there.rows, strict=True):
        judged = {(one.response, one.value, one.tokens, one.ended) for one in both}
        texts = [one.response for one in both]
        same += len(judged) == 1
        if len(set(texts)) == 1:
            assert len(judged) == 1
            continue
        said = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        parted = next(at for at, pair in enumerate(zip(*said, strict=False)) if pair[0] != pair[1])
        for tokens in said:
            assert max(in_process.score(task, prompt, tokens[: parted + 1]).gaps) <= TIE_NATS
    assert same >= LIMIT / 2


def test_prompts_reach_the_router_as_the_tokens_that_modules_were_tuned_on(
    bundle: Bundle, examples: dict[str, list[Example]], served: Serving
) -> None:
    lm = RoutedModules(str(bundle.folder), "math", served.url)
    prompts = [(one.messages, one.source) for one in examples["math"][:2]]
    texts = [
        lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages, _ in prompts
    ]
    made = answered(lm, texts)
    # In the order in which answers came.
    assert lm.generated.keys() == {tuple(one) for one in encode_prompts(prompts, lm.tokenizer)}
    assert all(1 <= one.tokens <= SHORT for one in lm.generated.values())
    assert len(made) == 2


def test_another_tasks_prefill_module_shows_in_the_answers(
    bundle: Bundle, served: Serving, routed: Path, examples: dict[str, list[Example]]
) -> None:
    """tools' P makes of tools' prompts calls, math's makes none: a wrong pairing is not silent."""
    right = samples(routed, "qsun-post", "tools").rows[:3]
    lm = RoutedModules(str(bundle.folder), "math", served.url)
    texts = [
        lm.tokenizer.apply_chat_template(one.messages, tokenize=False, add_generation_prompt=True)
        for one in examples["tools"][:3]
    ]
    wrong = answered(lm, texts)
    assert all(text != row.response for text, row in zip(wrong, right, strict=True))
    begun = [text.lstrip().startswith("[{") for text in wrong]
    assert sum(row.response.lstrip().startswith("[{") for row in right) == 3
    assert not any(begun)
    assert not any(makes_calls(text) for text in wrong)
