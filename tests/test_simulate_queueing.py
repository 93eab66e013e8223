"""The simulator against queueing theory, and against sums that must come out whatever happens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from qsun.policy import Policy
from qsun.simulate.cluster import Load, Run, simulate
from qsun.simulate.curves import Line, StepTimes, Timing
from qsun.simulate.measures import within
from qsun.simulate.window import Window
from qsun.workload import Request, Workload, closed_loop, open_loop
from tests.simulating import TASKS, layout, request, timing

STEP_S, TOKENS = 0.1, 10  # a mean service of one second
SECONDS, WARM_UP_S = 4000.0, 200.0


def waits(workload: Workload, seed: int) -> Run:
    """One server, its queue and nothing else."""
    requests = open_loop(workload, TASKS, SECONDS, seed)
    window = Window(WARM_UP_S, SECONDS, 500)
    return simulate(layout(streams=1), timing(STEP_S), Load(requests), window)


def waits_of(run: Run) -> list[float]:
    return [one.admitted_s - one.began_s for one in run.journeys if one.admitted_s is not None]


def lindley(run: Run) -> list[float]:
    """Each request's wait, from the one before: what was left of its wait and service."""
    found, left, before_s = [], 0.0, 0.0
    for one in run.journeys:
        left = max(0.0, left - (one.began_s - before_s))
        found.append(left)
        left, before_s = left + STEP_S * one.request.output_tokens, one.began_s
    return found


def mean_wait_s(run: Run) -> float:
    return float(
        np.mean([one.admitted_s - one.began_s for one in within(run) if one.admitted_s is not None])
    )


@pytest.mark.parametrize(
    ("output", "second_moment"),
    [
        # Geometric lengths are the exponential's in steps: E[N^2] = (2 - p) / p^2.
        (f"geometric:{TOKENS}", (2 - 1 / TOKENS) * TOKENS**2),
        (f"fixed:{TOKENS}", TOKENS**2),
    ],
    ids=["M/M/1", "M/D/1"],
)
def test_one_worker_with_one_stream_is_a_queue_with_one_server(
    output: str, second_moment: float
) -> None:
    rate = 0.5
    workload = Workload(rate_per_s=rate, prompt_tokens="fixed:2", output_tokens=output)
    runs = [waits(workload, seed) for seed in range(12)]
    means = [mean_wait_s(run) for run in runs]
    # Pollaczek and Khinchine: rate * E[S^2] / (2 * (1 - load)), at a mean service of one second.
    expected = rate * second_moment * STEP_S**2 / (2 * (1 - rate))
    half = stats.sem(means) * stats.t.ppf(0.995, len(means) - 1)
    assert abs(np.mean(means) - expected) < half
    assert np.mean(means) == pytest.approx(expected, rel=0.06)
    for run in runs:
        assert waits_of(run) == pytest.approx(lindley(run), abs=1e-3)


def test_littles_law_holds_in_a_steady_window() -> None:
    workload = Workload(rate_per_s=8.0, output_tokens="geometric:40", alpha=1.0)
    requests = open_loop(workload, TASKS, 700, seed=4)
    run = simulate(
        layout(2, streams=16), timing(0.01, 0.001, 0.02, 0.01), Load(requests), Window(50, 600, 100)
    )
    came = within(run)
    spent = np.mean([one.request_s for one in came if one.request_s is not None])
    assert all(one.answered for one in came)
    assert run.in_system == pytest.approx(len(came) / 550 * spent, rel=0.03)


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("kv", [None, (12, 16)])
def test_littles_law_is_exact_from_empty_to_empty(
    policy: Policy, kv: tuple[int, int] | None
) -> None:
    workload = Workload(
        rate_per_s=30.0, prompt_tokens="uniform:2:60", output_tokens="uniform:1:30", alpha=1.5
    )
    requests = open_loop(workload, TASKS, 10, seed=8)
    run = simulate(
        layout(5, 4, policy, kv=kv), timing(0.01, 0.001, 0.01, 0.01), Load(requests), Window(0, 200)
    )
    assert len(run.journeys) == len(requests)
    assert all(one.answered for one in run.journeys)
    spent = sum(one.request_s or 0 for one in run.journeys)
    assert run.in_system * 200 == pytest.approx(spent, rel=1e-9)


def closed(users: int, output: str, seconds: float) -> Run:
    """Users without a queue anywhere; steps take 10 ms and 1 ms for each request."""
    workload = Workload(concurrency=users, prompt_tokens="fixed:2", output_tokens=output)
    load = Load(users=users, endless=closed_loop(workload, ("math",), seed=3))
    where = layout(streams=64, tasks=("math",), prefill=users)
    return simulate(where, timing(0.01, 0.001, 0.1, 0.05), load, Window(20, seconds))


def mean_batch(run: Run) -> float:
    steps = sum(end - begin for begin, end in run.steps.values())
    return decoded(run) / steps


def decoded(run: Run) -> int:
    found = 0
    for worker in run.decode:
        begin, end = run.steps[worker]
        for stay in worker.stays:
            if stay.joined_step is not None:
                left = worker.steps if stay.left_step is None else stay.left_step
                found += max(0, min(left, end) - max(stay.joined_step, begin))
    return found


@pytest.mark.parametrize("users", [1, 7, 32])
def test_users_in_step_take_what_can_be_worked_out(users: int) -> None:
    run = closed(users, "fixed:50", 60)
    step_s = 0.01 + 0.001 * users
    for one in run.journeys:
        if one.answered:
            assert one.ttft_s == pytest.approx(0.15 + step_s)
            assert one.tpot_s == pytest.approx(step_s)
            assert one.request_s == pytest.approx(0.15 + 50 * step_s)
    assert mean_batch(run) == pytest.approx(users)


def test_users_out_of_step_meet_at_the_fixed_point() -> None:
    users, output = 32, 100
    run = closed(users, f"geometric:{output}", 300)
    # Batch = users * (share of a cycle that is decoding); a new one waits half a step on average.
    batch = float(users)
    for _ in range(100):
        step_s = 0.01 + 0.001 * batch
        batch = users * output * step_s / (0.15 + step_s / 2 + output * step_s)
    assert mean_batch(run) == pytest.approx(batch, rel=0.01)
    expected = batch / step_s
    assert decoded(run) / run.window.length_s == pytest.approx(expected, rel=0.01)


def times_of(requests: Sequence[Request], streams: int) -> list[tuple[float, float]]:
    run = simulate(
        layout(streams=streams), timing(1.0, 1.0, 0.5, 0.25), Load(requests), Window(0, 100)
    )
    return [(one.first_s or -1, one.ended_s or -1) for one in run.journeys]


def test_requests_join_at_the_next_step() -> None:
    # The first begins at 0.75 and steps by 2 s; the second is there at 3.75, joins at 4.75, and
    # both step by 3 s until the first has its three tokens.
    found = times_of([request(0, 3), request(3, 2)], streams=8)
    assert found == [(2.75, 7.75), (7.75, 9.75)]


def test_a_full_worker_lets_the_next_one_wait_before_its_prompt_is_read() -> None:
    # With one stream: 0.75 + 2 + 2, then prefill and hand-off once more, then 2.
    assert times_of([request(0, 2), request(1, 1)], streams=1) == [(2.75, 4.75), (7.5, 7.5)]


def test_a_step_takes_longer_the_longer_its_contexts() -> None:
    step_s = StepTimes({n: Line((10.0, 1010.0), (0.01, 0.11)) for n in (1, 8)})
    times = Timing(step_s, Line((1.0,), (1e-9,)), 0.0)
    requests = [request(0, 10, 20), request(0, 4, 60), request(2, 3, 100)]
    run = simulate(layout(prefill=2), times, Load(requests), Window(0, 9))
    # 9 ms and 0.1 ms for each token of the mean context: both until the second's four tokens.
    together = sum(0.009 + 0.0001 * (40 + done) for done in range(4))
    alone = sum(0.009 + 0.0001 * (20 + done) for done in range(4, 10))
    later = sum(0.009 + 0.0001 * (100 + done) for done in range(3))
    assert [one.request_s for one in run.journeys] == pytest.approx(
        [together + alone, together, later], abs=1e-7
    )
