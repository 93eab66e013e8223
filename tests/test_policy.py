"""Policies and plans: which decode worker goes on with a request, and which workers there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun.errors import ConfigError
from qsun.launch_spec import LaunchSpec, launch_spec
from qsun.policy import Load, Policy, choose, eligible
from qsun.serve.plan import (
    CACHE_OPTION,
    GPU_SHARE,
    LEAST_SHARE,
    SHARE_OPTION,
    VISIBLE_GPUS,
    on_gpus,
    predecessors,
    serving_plan,
    with_caches,
)
from tests.manifests import manifest, prefill_module

TASKS = ("chat", "math", "tools")
POLICIES = list(Policy)
NAMES = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


def load(worker: str, in_flight: int = 0, reserved: int = 0, streams: int = 8) -> Load:
    return Load(worker, in_flight, streams, reserved, 100)


def spec() -> LaunchSpec:
    """`prefill` for math and tools, `prefill-code-v2`, `prefill-sql`, `decode`."""
    return launch_spec(manifest(), "gpu")


def refusal(decode: int, prefill: dict[str, int], of: LaunchSpec | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        serving_plan(of or spec(), decode, prefill)
    return str(caught.value)


def names(plan: LaunchSpec) -> list[str]:
    return [worker.name for worker in plan.workers]


@pytest.mark.parametrize("policy", [one for one in Policy if one is not Policy.ISOLATED])
def test_any_worker_may_take_any_task(policy: Policy) -> None:
    assert eligible(policy, ["a", "b"], TASKS, "math") == {"a", "b"}


def test_isolated_tasks_have_workers_of_their_own() -> None:
    workers = ["w2", "w0", "w1"]
    dealt = [eligible(Policy.ISOLATED, workers, TASKS, task) for task in TASKS]
    assert dealt == [{"w0"}, {"w1"}, {"w2"}]


def test_isolated_tasks_share_workers_where_there_are_too_few() -> None:
    dealt = [eligible(Policy.ISOLATED, ["w0", "w1"], TASKS, task) for task in TASKS]
    assert dealt == [{"w0"}, {"w1"}, {"w0"}]


def test_an_isolated_task_has_several_workers_where_there_are_more() -> None:
    workers = [f"w{number}" for number in range(5)]
    dealt = [eligible(Policy.ISOLATED, workers, TASKS, task) for task in TASKS]
    assert dealt == [{"w0", "w3"}, {"w1", "w4"}, {"w2"}]


@pytest.mark.parametrize("policy", POLICIES)
def test_without_workers_nobody_may_take_a_task(policy: Policy) -> None:
    assert eligible(policy, [], TASKS, "math") == frozenset()


@settings(derandomize=True, max_examples=100)
@given(workers=NAMES, tasks=NAMES)
def test_isolation_leaves_no_task_and_no_worker_out(workers: list[str], tasks: list[str]) -> None:
    dealt = [eligible(Policy.ISOLATED, workers, tasks, task) for task in tasks]
    assert all(dealt)
    assert frozenset().union(*dealt) == set(workers)
    shares = Counter(worker for one in dealt for worker in one)
    assert max(shares.values()) - min(shares.values()) <= 1
    if len(workers) >= len(tasks):
        assert set(shares.values()) == {1}


def test_the_shared_policy_takes_the_least_loaded() -> None:
    assert choose(Policy.SHARED, [load("a", 3), load("b", 1), load("c", 2)], 0) == "b"


def test_a_worker_is_as_full_as_its_requests_or_its_blocks() -> None:
    assert load("a", in_flight=4, reserved=10).share == 0.5
    assert load("a", in_flight=4, reserved=90).share == 0.9
    few_but_long, many_but_short = load("a", 1, reserved=90), load("b", 4, reserved=10)
    assert choose(Policy.SHARED, [few_but_long, many_but_short], 0) == "b"


def test_equally_full_workers_go_by_requests_then_by_name() -> None:
    more, fewer = load("a", in_flight=4, reserved=50), load("b", in_flight=2, reserved=50)
    assert choose(Policy.SHARED, [more, fewer], 0) == "b"
    assert choose(Policy.SHARED, [load("b"), load("a"), load("c")], 7) == "a"


def test_round_robin_takes_one_after_another_whatever_they_do() -> None:
    loads = [load("c"), load("a", 7), load("b")]
    assert [choose(Policy.ROUND_ROBIN, loads, turn) for turn in range(4)] == ["a", "b", "c", "a"]


def test_power_of_two_never_takes_the_fullest_of_three() -> None:
    loads = [load("a", 1), load("b", 7), load("c", 2)]
    chosen = Counter(choose(Policy.POWER_OF_TWO, loads, turn) for turn in range(600))
    assert chosen.keys() == {"a", "c"}
    # `c` wins only where `a` was not drawn: one draw of three.
    assert 150 < chosen["c"] < 250


def test_power_of_two_of_two_takes_the_less_loaded() -> None:
    assert choose(Policy.POWER_OF_TWO, [load("a", 2), load("b", 1)], 0) == "b"


@settings(derandomize=True, max_examples=100)
@given(
    policy=st.sampled_from(POLICIES),
    workers=NAMES,
    loads=st.lists(st.integers(0, 8), min_size=6, max_size=6),
    turn=st.integers(0, 10**6),
)
def test_the_same_turn_gives_the_same_choice_in_any_order(
    policy: Policy, workers: list[str], loads: list[int], turn: int
) -> None:
    given_loads = [load(name, count) for name, count in zip(workers, loads, strict=False)]
    chosen = choose(policy, given_loads, turn)
    assert chosen in workers
    assert choose(policy, given_loads[::-1], turn) == chosen


def test_a_plan_has_as_many_workers_as_asked_for() -> None:
    plan = serving_plan(spec(), 2, {"SQL": 3})
    assert names(plan) == [
        *("prefill", "prefill-code-v2"),
        *("prefill-sql-0", "prefill-sql-1", "prefill-sql-2", "decode-0", "decode-1"),
    ]
    assert [worker.tasks for worker in plan.workers[2:5]] == [("SQL",)] * 3


def test_single_workers_keep_their_names() -> None:
    assert serving_plan(spec(), 1, {}) == spec()


def test_tasks_on_one_worker_are_on_all_of_its_copies() -> None:
    plan = serving_plan(spec(), 1, {"math": 2, "tools": 3})
    copies = [worker for worker in plan.of("prefill") if "math" in worker.tasks]
    assert [worker.name for worker in copies] == ["prefill-0", "prefill-1", "prefill-2"]
    assert {worker.tasks for worker in copies} == {("math", "tools")}


def test_a_plan_names_every_mistake() -> None:
    message = refusal(0, {"nothing": 1, "other": 2, "math": 0, "SQL": -1})
    for part in (
        "--decode 0: at least 1",
        "--prefill SQL=-1: at least 1",
        "--prefill math=0: at least 1",
        "--prefill nothing: the tasks are SQL, code.v2, math, tools",
        "--prefill other: the tasks are SQL, code.v2, math, tools",
    ):
        assert part in message


def test_no_two_workers_get_one_name() -> None:
    modules = (prefill_module("a"), prefill_module("a-0"))
    made = launch_spec(replace(manifest(), prefill=modules), "cpu")
    assert "prefill-a-0" in refusal(1, {"a": 2}, made)
    assert len(set(names(serving_plan(made, 1, {"a-0": 2})))) == 4


def test_workers_are_dealt_to_gpus_and_share_their_memory() -> None:
    plan = on_gpus(serving_plan(spec(), 2, {}), ["2", "GPU-5"])
    assert [worker.environment[VISIBLE_GPUS] for worker in plan.workers] == [
        *("2", "GPU-5", "2", "GPU-5", "2")
    ]
    shares = [worker.arguments[-2:] for worker in plan.workers]
    third, half = f"{GPU_SHARE / 3:.3f}", f"{GPU_SHARE / 2:.3f}"
    assert shares == [(SHARE_OPTION, third if gpu == "2" else half) for gpu in "2G2G2"]


def test_a_gpu_for_each_worker_leaves_memory_to_vllm() -> None:
    plan = on_gpus(spec(), list("01234567"))
    assert [worker.environment[VISIBLE_GPUS] for worker in plan.workers] == list("0123")
    assert [worker.arguments for worker in plan.workers] == [
        worker.arguments for worker in spec().workers
    ]


def test_workers_of_one_gpu_measure_its_memory_one_after_another() -> None:
    plan = on_gpus(serving_plan(spec(), 2, {}), ["0", "1"])
    prefill, code, sql, first, second = names(plan)
    assert predecessors(plan) == {sql: prefill, first: code, second: sql}
    assert predecessors(on_gpus(spec(), list("0123"))) == {}
    assert predecessors(spec()) == {}


def test_workers_whose_caches_have_a_size_wait_for_nobody_and_want_no_share() -> None:
    plan = on_gpus(with_caches(spec(), 6 * 1024**3), ["0"])
    for worker in plan.workers:
        size, share = worker.arguments[-4:-2], worker.arguments[-2:]
        assert size == (CACHE_OPTION, "6442450944")
        assert share == (SHARE_OPTION, f"{LEAST_SHARE:.3f}")
    assert predecessors(plan) == {}


def test_without_a_gpu_nothing_is_dealt() -> None:
    with pytest.raises(ConfigError, match="this machine has none"):
        on_gpus(spec(), [])
