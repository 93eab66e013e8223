"""`qsun simulate`: three questions, their records, and what is refused before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qsun.policy import Policy
from qsun.records import read_record
from qsun.simulate.cluster import Load, simulate
from qsun.simulate.config import FleetConfig, LayoutConfig, SimulateConfig, SloConfig
from qsun.simulate.curve_records import read_curves
from qsun.simulate.fleet import cases, size_fleet, smallest
from qsun.simulate.measures import holds, within
from qsun.simulate.requests import requests_of
from qsun.simulate.systems import layout_of, of_one_task, prefill_groups
from qsun.simulate.window import Window
from qsun.workload import Workload, trace_lines
from tests.command import Outcome, run_qsun
from tests.simulating import TASKS, latency_result, request, write_curves

SHORT = ("--set", "duration_s=20", "--set", "warm_up_s=4", "--set", "settle_s=10")
FLEET = SimulateConfig(
    ask="fleet",
    tasks=TASKS,
    workload=Workload(rate_per_s=30.0, alpha=1.0, output_tokens="geometric:60"),
    layout=LayoutConfig(streams=12),
    slo=SloConfig(ttft_p99_s=0.5, tpot_p99_s=0.02),
    fleet=FleetConfig(repeats=2, most=32),
    duration_s=24,
    warm_up_s=4,
    settle_s=10,
)


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    return write_curves(tmp_path / "latency.json")


def asked(curves: Path, *options: str | Path) -> dict[str, Any]:
    outcome = run_qsun("simulate", curves, "--rate", "6", *SHORT, *options, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def test_a_run_is_printed_and_recorded_in_the_same_words(curves: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "simulation.json"
    options = ("--rate", "6", "--alpha", "1", *SHORT, "--out", out)
    outcome = run_qsun("simulate", curves, *options)
    assert outcome.exit_code == 0, outcome.stderr
    record = read_record(out, "simulation")
    run = record.result["run"]
    assert (run["system"], run["policy"], run["format"]) == ("qsun", "shared", "W4A16")
    assert run["ttft_s"].keys() == run["tpot_s"].keys() == {"mean", "p50", "p90", "p99"}
    assert run["interactivity_tokens_per_s"].keys() == {"mean", "p50", "p10", "p1"}
    assert run["by_worker"].keys() == {"decode-000", "decode-001"}
    assert list(run["by_task"]) == ["task-1", "task-2", "task-3", "task-4"]
    assert run["tokens_per_s_per_decode_worker"] == pytest.approx(run["tokens_per_s"] / 2)
    assert run["tokens_per_s"] == pytest.approx(6 * 64, rel=0.25)
    by_task = sum(one["tokens_per_s"] for one in run["by_task"].values())
    assert by_task == pytest.approx(run["tokens_per_s"])
    assert record.result["curves"]["records"][0]["file"] == "latency.json"
    assert record.config["workload"]["alpha"] == 1
    assert record.versions["simpy"]
    assert f"{run['ttft_s']['p99']:.3f}" in outcome.stdout
    assert outcome.stdout.endswith(f"written to {out}\n")
    again = run_qsun("simulate", curves, *options)
    assert again.exit_code == 7
    assert "already exists" in again.message


def test_the_same_seed_gives_the_same_answer(curves: Path) -> None:
    assert asked(curves) == asked(curves)
    assert asked(curves)["run"] != asked(curves, "--seed", "1")["run"]


def test_a_trace_and_users_may_ask(curves: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = [request(one / 2, task=TASKS[one % 4], prompt=900) for one in range(38)]
    trace.write_text(trace_lines(requests))
    found = asked(curves, "--trace", trace, "--tasks", ",".join(TASKS))["run"]
    assert found["sent"] == sum(4 <= one.at_s < 20 for one in requests)
    assert found["beyond_measured"]["prompts_longer"] == 38
    users = run_qsun("simulate", curves, "--users", "3", "--tasks", "9", *SHORT, "--json")
    run = json.loads(users.stdout)["run"]
    assert run["mean_in_system"] == pytest.approx(3)
    assert list(run["by_task"])[-1] == "task-9"


def test_lengths_that_were_not_measured_are_warned_of(curves: Path) -> None:
    outcome = run_qsun("simulate", curves, "--rate", "6", "--prompt", "fixed:600", *SHORT)
    assert "prompts are longer than any measured" in outcome.stdout
    assert "requests grow longer than any context measured" in outcome.stdout
    assert "WARNING" not in run_qsun("simulate", curves, "--rate", "6", *SHORT).stdout


def test_events_are_played_under_every_policy_and_sizing(curves: Path) -> None:
    found = asked(curves, "--ask", "events", "--set", "events.at_s=8", "--decode", "2")["events"]
    played = [(one["scenario"], one["policy"], one["sizing"]) for one in found]
    assert len(played) == len(set(played)) == 2 * 10 + 2 * 4
    assert ("spike", "isolated", "reactive") not in played
    assert ("spike", "power-of-two", "predictive") in played
    by_scenario = {one["scenario"]: one for one in found if one["sizing"] == "fixed"}
    assert [size["decode_workers"] for size in by_scenario["loss"]["pool"]] == [2, 1]
    assert [size["decode_workers"] for size in by_scenario["shrink"]["pool"]] == [2, 1]
    assert (
        by_scenario["growth"]["pool"]
        == [
            {"at_s": 0, "decode_workers": 2},
            {"at_s": 38, "decode_workers": 3},
        ][: len(by_scenario["growth"]["pool"])]
    )
    spike, calm = by_scenario["spike"], by_scenario["growth"]
    more = spike["by_task"]["task-1"]["sent"] - calm["by_task"]["task-1"]["sent"]
    assert more == pytest.approx(3 * 1.5 * 12, rel=0.35)  # threefold more for twelve seconds
    assert spike["by_task"]["task-2"]["sent"] == calm["by_task"]["task-2"]["sent"]
    assert sum(part["sent"] for part in spike["timeline"]) == spike["sent"]


def test_a_fleet_is_a_table_of_three_systems(curves: Path) -> None:
    options = ("--ask", "fleet", "--tasks", "3", "--ttft-p99", "0.5", "--tpot-p99", "0.03")
    outcome = run_qsun("simulate", curves, "--rate", "6", *SHORT, *options)
    assert outcome.exit_code == 0, outcome.stderr
    assert [line.split()[0] for line in outcome.stdout.splitlines()[2:5]] == [
        "isolated",
        "sun",
        "qsun",
    ]
    rows = asked(curves, *options, "--set", "fleet.rates=[4, 8]")["fleet"]
    assert [(one["system"], one["rate_per_s"]) for one in rows][2:4] == [
        ("qsun", 4),
        ("isolated", 8),
    ]
    assert sum(rows[0]["decode_workers_by_task"].values()) == rows[0]["decode_workers"] >= 3


def held_by(config: SimulateConfig, path: Path, system: str, sizes: dict[str, int]) -> bool:
    """Whether pools of these sizes hold, by task or for `all`, simulated apart from the search."""
    curves, came = read_curves([path]), []
    draws = [requests_of(config, config.seed + one) for one in range(config.fleet.repeats)]
    where = layout_of(config, curves, system, max(draws, key=len))
    for draw in draws:
        for key, size in sizes.items():
            alone = where.policy is Policy.ISOLATED
            requests = [one for one in draw if one.task == key or not alone]
            mine = of_one_task(where, key, size) if alone else replace(where, decode_workers=size)
            timing = curves.timing("W4A16" if system == "qsun" else "bfloat16")
            window = Window(config.warm_up_s, config.duration_s, config.settle_s)
            came += within(simulate(mine, timing, Load(requests), window))
    return holds(came, config.slo)


def test_a_fleet_holds_and_would_not_with_one_worker_less(curves: Path) -> None:
    found = {case.system: size_fleet(case, FLEET, read_curves([curves])) for case in cases(FLEET)}
    for system, one in found.items():
        sizes = one["decode_workers_by_task"] or {"all": one["decode_workers"]}
        assert held_by(FLEET, curves, system, sizes)
        for key, size in sizes.items():
            if size > 1:
                assert not held_by(FLEET, curves, system, sizes | {key: size - 1})
        assert one["tpot_p99_s"] <= FLEET.slo.tpot_p99_s
        assert one["ttft_p99_s"] <= FLEET.slo.ttft_p99_s
    assert found["isolated"]["decode_workers"] > found["sun"]["decode_workers"]
    assert found["sun"]["decode_workers"] > found["qsun"]["decode_workers"] > 1


def test_a_fleet_that_nothing_makes_fast_enough_is_none(curves: Path) -> None:
    config = replace(FLEET, slo=SloConfig(1.0, 0.005), fleet=FleetConfig(most=3))
    for case in cases(config):
        found = size_fleet(case, config, read_curves([curves]))
        assert found["decode_workers"] is None
        assert found["missed"]["tpot"] > 0


@pytest.mark.parametrize("answer", [1, 2, 3, 7, 8, 9, 31, 32])
def test_the_smallest_is_found_and_the_one_below_was_tried(answer: int) -> None:
    tried = []

    def enough(size: int) -> bool:
        tried.append(size)
        return size >= answer

    assert smallest(enough, 32) == answer
    assert answer == 1 or answer - 1 in tried
    assert smallest(enough, answer) == answer
    assert answer == 1 or smallest(enough, answer - 1) is None


def test_tasks_may_share_prefill_workers() -> None:
    assert prefill_groups(TASKS, ()) == [(task,) for task in TASKS]
    assert prefill_groups(TASKS, ("math", "code")) == [("code", "math"), ("chat",), ("tools",)]
    assert prefill_groups(TASKS, ("all",)) == [TASKS]


def refused(outcome: Outcome, exit_code: int) -> str:
    assert (outcome.exit_code, outcome.stdout) == (exit_code, ""), outcome.stderr
    return outcome.message


def test_all_that_is_wrong_with_a_question_is_said_at_once(curves: Path, tmp_path: Path) -> None:
    message = refused(
        run_qsun(
            *(
                "simulate",
                curves,
                "--ask",
                "fleet",
                "--tasks",
                "math,math,code",
                "--prompt",
                "many",
            ),
            *("--set", "warm_up_s=500", "--set", "layout.quantized=W3A16", "--users", "3"),
            *("--set", "layout.shared_prefill=[cod]", "--set", "sizing.low=0.9"),
            *("--set", "layout.policy=shared"),
            *("--set", "layout.full_precision=float16", "--out", tmp_path / "none.json"),
        ),
        3,
    )
    for part in (
        "prompt_tokens: many is not one of",
        "tasks: math, more than once",
        "layout.shared_prefill: no task cod (did you mean code?)",
        "layout.quantized: no curves of format W3A16 (did you mean W4A16?)",
        "layout.full_precision: no curves of format float16",
        "warm_up_s: 500 is not before",
        "fleet needs an open loop",
        "layout.policy: fleet has policies of its own",
        "layout.shared_prefill: isolated tasks share nothing",
        "sizing.low: 0.9 is not below",
    ):
        assert part in message
    assert not (tmp_path / "none.json").exists()


def test_which_quantized_format_must_be_said_where_there_are_two(tmp_path: Path) -> None:
    result = latency_result()
    result["tpot"] += [row | {"format": "W8A16"} for row in result["tpot"][:6]]
    path = write_curves(tmp_path / "latency.json", result)
    message = refused(run_qsun("simulate", path, "--rate", "5"), 3)
    assert "say which format system qsun has; curves of bfloat16, W4A16, W8A16" in message
    assert asked(path, "--set", "layout.quantized=W8A16")["run"]["format"] == "W8A16"
    assert asked(path, "--system", "sun")["run"]["format"] == "bfloat16"


def test_settings_come_from_a_file_and_flags_win(curves: Path, tmp_path: Path) -> None:
    path = tmp_path / "question.yaml"
    path.write_text("workload: {rate_per_s: 2, alpha: 1.5}\nduration_s: 20\nwarm_up_s: 1\n")
    out = tmp_path / "simulation.json"
    outcome = run_qsun(
        *("simulate", curves, "--config", path, "--alpha", "0.5"),
        *("--set", "workload.alpha=3", "--out", out),
    )
    assert outcome.exit_code == 0, outcome.stderr
    workload = read_record(out, "simulation").config["workload"]
    assert (workload["rate_per_s"], workload["alpha"]) == (2, 0.5)
    assert "rat: no such setting" in refused(
        run_qsun("simulate", curves, "--set", "workload.rat=3"), 3
    )


def test_what_is_no_curve_or_trace_is_refused(curves: Path, tmp_path: Path) -> None:
    other = write_curves(tmp_path / "other.json", kind="scorecard")
    assert "is a scorecard" in refused(run_qsun("simulate", other, "--rate", "5"), 1)
    empty = write_curves(tmp_path / "empty.json", latency_result() | {"tpot": []})
    assert "tpot: no rows" in refused(run_qsun("simulate", empty, "--rate", "5"), 6)
    trace = tmp_path / "trace.jsonl"
    trace.write_text(trace_lines([request(task="maths")]))
    named = ("--tasks", "math", "--trace", trace)
    assert "task maths is not served" in refused(run_qsun("simulate", curves, *named), 6)


def test_an_interrupted_simulation_leaves_nothing(
    curves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsun.simulate.fleet.size_fleet", stopped)
    out = tmp_path / "simulation.json"
    outcome = run_qsun("simulate", curves, "--ask", "fleet", "--rate", "5", "--out", out)
    assert outcome.exit_code == 130
    assert outcome.message == "interrupted; nothing was published\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.json"]
