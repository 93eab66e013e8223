"""The hand-off's own rules, and what it is judged by, without vLLM: workers that tell a story."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qsun.disaggregation import Answer, Asked, HandOffError, WrittenAs, hand_off
from qsun.environments import find_serving_environment
from qsun.errors import ServingEnvironmentError
from qsun.references import Reference
from qsun.verify.served.answers import difference
from qsun.verify.served.prompts import prompts_of_lengths
from qsun.vllm_server import PROGRAM, VllmServer
from qsun.worker_counts import WorkerCounts, worker_counts
from tests.processes import ends, runs

PARAMETERS = {
    "do_remote_prefill": True,
    "remote_engine_id": "qsun|0123456789abcdef|math|p",
    "remote_request_id": "r",
    "remote_block_ids": [[1]],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "remote_num_tokens": 3,
}
ASKED = Asked((5, 6, 7), 2, "salt")
MATH = WrittenAs("math", "0123456789abcdef" + 48 * "7")
METRICS = """
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="decode",source="local_compute"} 1.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="decode",source="local_cache_hit"} 2.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="decode",source="external_kv_transfer"} 3.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="decode",source="external_kv_transfer"} 4.0
vllm:generation_tokens_total{engine="0",model_name="decode"} 8.0
vllm:num_preemptions_total{engine="0",model_name="decode"} 0.0
vllm:iteration_tokens_total_count{engine="0",model_name="decode"} 5.0
"""


@dataclass(frozen=True)
class Told(VllmServer):
    """A worker that gives one answer and keeps what it was sent."""

    answer: Mapping[str, Any] = field(default_factory=dict)
    sent: list[Mapping[str, Any]] = field(default_factory=list)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.sent.append(body)
        return dict(self.answer)


def worker(answer: Mapping[str, Any]) -> Told:
    return Told("http://nowhere", "model", io.StringIO(), "worker", answer)


def prefill(parameters: Mapping[str, Any] | None, read: tuple[int, ...] = ASKED.prompt) -> Told:
    choice = {"prompt_token_ids": list(read)}
    return worker({"choices": [choice], "kv_transfer_params": parameters})


def decode() -> Told:
    scores = {
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"token_id:8": -0.5}, {"token_id:9": -1.0}],
    }
    return worker({"choices": [{"token_ids": [8, 9], "logprobs": scores}]})


def test_the_decode_worker_gets_the_same_tokens_and_where_their_cache_lies() -> None:
    first, second = prefill(PARAMETERS), decode()
    answer = hand_off(first, second, MATH, ASKED)
    assert answer == Answer([8, 9], [-0.5, -1.0], [{8: -0.5}, {9: -1.0}])
    (asked,), (told,) = first.sent, second.sent
    assert (asked["model"], asked["max_tokens"]) == ("math", 1)
    assert asked["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert told["kv_transfer_params"] == PARAMETERS
    assert told["max_tokens"] == ASKED.new_tokens
    assert asked["prompt"] == told["prompt"] == [5, 6, 7]
    assert asked["cache_salt"] == told["cache_salt"] == "salt"


@pytest.mark.parametrize(
    ("first", "named"),
    [
        (prefill(None), "remote_engine_id, remote_request_id"),
        (prefill(PARAMETERS | {"remote_block_ids": []}), "remote_block_ids"),
        (prefill(PARAMETERS | {"do_remote_prefill": False}), "do_remote_prefill"),
        (prefill(PARAMETERS | {"remote_num_tokens": 2}), "wrote 2 of 3"),
        (prefill(PARAMETERS, read=(5, 6, 8)), "read other tokens"),
        (
            prefill(PARAMETERS | {"remote_engine_id": "p"}),
            "no seal, not qsun|0123456789abcdef|math",
        ),
        (
            prefill(PARAMETERS | {"remote_engine_id": "qsun|0123456789abcdef|tools|p"}),
            "another module's cache for math: qsun|0123456789abcdef|tools",
        ),
        (
            prefill(PARAMETERS | {"remote_engine_id": "qsun|fedcba9876543210|math|p"}),
            "another module's cache for math",
        ),
    ],
)
def test_what_was_not_handed_over_is_never_asked_of_the_decode_worker(
    first: Told, named: str
) -> None:
    second = decode()
    with pytest.raises(HandOffError, match=named):
        hand_off(first, second, MATH, ASKED)
    assert second.sent == []


def test_a_prompt_of_one_token_is_asked_of_no_worker() -> None:
    first, second = prefill(PARAMETERS), decode()
    with pytest.raises(HandOffError, match="one token"):
        hand_off(first, second, MATH, Asked((5,), 2, "salt"))
    assert first.sent == second.sent == []


def test_counters_of_all_engines_add_up_and_those_of_nixl_are_0_without_it() -> None:
    found = worker_counts(METRICS)
    assert found == WorkerCounts(1, 2, 7, 8, 0, 0, 0, 0, 0, 5)
    assert found.prompt_tokens == 10
    assert (found - found).prompt_tokens == 0


def test_a_vllm_that_does_not_count_is_refused() -> None:
    with pytest.raises(ServingEnvironmentError, match="num_preemptions_total"):
        worker_counts(METRICS.replace("vllm:num_preemptions", "vllm:evictions"))


def test_prompts_have_the_lengths_asked_for_and_end_as_the_tasks_do() -> None:
    references = [Reference([1, 2, 3], [4]), Reference([5, 6], [7, 8])]
    assert prompts_of_lengths(references, [2, 2, 6, 9]) == [
        (2, 3),
        (5, 6),
        (6, 7, 8, 1, 2, 3),
        (5, 6, 7, 8, 1, 2, 3, 4, 5, 6)[1:],
    ]


def test_a_difference_ends_where_answers_part_and_is_0_between_equal_ones() -> None:
    first = Answer([1, 2, 3], [-0.1, -0.2, -0.3], [{1: -0.1, 9: -3.0}, {2: -0.2, 4: -2.0}, {3: 0}])
    assert difference(first, first) == 0
    other = Answer([1, 4, 3], [-0.1, -0.5, -9.0], [{1: -0.1, 9: -3.0}, {2: -1.2, 4: -0.5}, {3: -9}])
    assert difference(first, other) == pytest.approx((0 + (1.0 + 1.5) / 2) / 2)


def test_a_token_that_only_one_lists_counts_as_the_others_least_likely() -> None:
    first = Answer([1], [-0.1], [{1: -0.1, 2: -4.0}])
    other = Answer([1], [-0.1], [{1: -0.1, 3: -5.0}])
    assert difference(first, other) == pytest.approx((0 + 1.0 + 1.0) / 3)


def test_nixls_progress_thread_rests() -> None:
    """As in every worker: an idle agent, made after `vllm_process.py` was run."""
    code = f"""
import os, runpy, time
runpy.run_path({str(PROGRAM)!r}, run_name="__mp_main__")
print("limit", os.environ["UCX_RCACHE_MAX_UNRELEASED"])
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("idle", nixl_agent_config(num_threads=4))
before = time.process_time()
time.sleep(2)
print("idle", time.process_time() - before)
"""
    python = find_serving_environment().python
    outcome = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={"UCX_TLS": "tcp,sm,self,cma", "PATH": "/usr/bin:/bin"},
    )
    lines = outcome.stdout.splitlines()
    told = [line for line in lines if line.startswith("idle")]
    assert told, outcome.stderr[-2000:]
    assert "limit 1024" in lines
    assert float(told[0].split()[1]) < 0.4


def test_a_server_ends_when_whoever_started_it_was_killed(tmp_path: Path) -> None:
    """The server here ignores what vLLM loses while it starts."""
    (tmp_path / "stubborn.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    code = f"""
import os, subprocess, sys, time
command = [sys.executable, {str(PROGRAM)!r}, str(os.getpid()), "stubborn"]
subprocess.Popen(command, cwd={str(tmp_path)!r}, start_new_session=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as starter:
        assert starter.stdout is not None
        server = int(starter.stdout.readline())
        assert runs(server)
        starter.kill()
    assert ends(server)
