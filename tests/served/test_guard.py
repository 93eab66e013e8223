"""What a decode worker's guard refuses, asked past the router as a broken router would."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from qsun.bundle import Bundle
from qsun.disaggregation import COMPLETIONS, KEEP_FOR_DECODE, Asked
from qsun.environments import find_serving_environment
from qsun.launch_arguments import LEASE_S
from qsun.vllm_server import VllmServer
from qsun.workers import GUARD
from tests.serving import Serving

PROMPT = tuple(range(1000, 1140))  # more than a block
ASKED = Asked(PROMPT, 4, "guard")
Parameters = dict[str, Any]


@pytest.fixture(scope="module")
def prefill(served: Serving) -> VllmServer:
    return served.server("prefill")


@pytest.fixture(scope="module")
def decode(served: Serving) -> VllmServer:
    return served.server("decode-1")


@pytest.fixture
def written(prefill: VllmServer) -> Parameters:
    """A cache that nobody has fetched yet."""
    body = ASKED.body(1, 0) | {"model": "math", "kv_transfer_params": KEEP_FOR_DECODE}
    parameters: Parameters = prefill.post(COMPLETIONS, body)["kv_transfer_params"]
    return parameters


def ask(decode: VllmServer, parameters: Parameters | None) -> tuple[int, str]:
    """Status of the answer, and what the guard said meanwhile."""
    decode.log.seek(0, 2)
    body = ASKED.body(4, 0) | {"model": "decode", "kv_transfer_params": parameters}
    answer = httpx.post(decode.url + COMPLETIONS, json=body, timeout=60)
    time.sleep(0.1)
    return answer.status_code, "".join(line for line in decode.log if "qsun" in line)


def in_use(worker: VllmServer) -> float:
    return sum(
        float(line.rpartition(" ")[2])
        for line in worker.metrics().splitlines()
        if line.startswith("vllm:kv_cache_usage_perc")
    )


def test_a_sealed_cache_is_fetched_once(decode: VllmServer, written: Parameters) -> None:
    assert ask(decode, dict(written)) == (200, "")
    status, said = ask(decode, dict(written))
    assert status == 500
    assert "its cache was fetched before" in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: None, "no prefill module wrote its prompt's cache"),
        (lambda one: one | {"do_remote_prefill": False}, "no prefill module wrote"),
        (
            lambda one: one | {"remote_engine_id": "plain"},
            "no prefill worker of this bundle sealed",
        ),
        (
            lambda one: one | {"remote_engine_id": one["remote_engine_id"].replace("|", "|0", 1)},
            "no prefill worker of this bundle sealed",
        ),
        (lambda one: one | {"remote_num_tokens": 139}, "the cache has 139 of 140 prompt tokens"),
        (lambda one: one | {"remote_num_tokens": 141}, "the cache has 141 of 140 prompt tokens"),
        (lambda one: one | {"remote_blocks_expiry_time": None}, "how long its cache is kept"),
        (
            lambda one: (
                one | {"remote_blocks_expiry_time": one["remote_blocks_expiry_time"] - LEASE_S}
            ),
            "caches that came after their lease",
        ),
        (lambda one: one | {"qsun_release": True}, "it only gives its cache back"),
    ],
)
def test_everything_else_is_refused_by_name_and_the_worker_goes_on(
    decode: VllmServer,
    written: Parameters,
    change: Callable[[Parameters], Parameters | None],
    reason: str,
) -> None:
    status, said = ask(decode, change(dict(written)))
    assert status == 500
    assert reason in said
    assert in_use(decode) == 0


def test_a_cache_that_is_given_back_is_free_at_once(
    prefill: VllmServer, decode: VllmServer
) -> None:
    before = in_use(prefill)
    body = ASKED.body(1, 0) | {"model": "tools", "kv_transfer_params": KEEP_FOR_DECODE}
    written = prefill.post(COMPLETIONS, body)["kv_transfer_params"]
    assert in_use(prefill) > before
    ask(decode, written | {"qsun_release": True})
    deadline = time.monotonic() + 5  # long before its lease ends
    while in_use(prefill) > before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def answers(bundle: Bundle) -> Any:
    """What the guard itself says, in the Python that has vLLM, of cases hard to bring about."""
    script = f"""
import json, os, sys
from pathlib import Path
from types import SimpleNamespace as Is
sys.path.insert(0, {str(GUARD)!r})
import qsun_guard as guard
one = guard.NixlConnector.__new__(guard.NixlConnector)
one._fetched = {{}}
full = dict(do_remote_prefill=True, remote_block_ids=[[1]], remote_request_id="r",
            remote_num_tokens=3, remote_blocks_expiry_time=1.0)
def problem(computed=0, **changed):
    request = dict(kv_transfer_params=full, prompt_token_ids=[1, 2, 3], num_preemptions=0)
    return one._problem(Is(**(request | changed)), computed)
def settings(policy="fail", compat=True, caching=False, model="./", reads=False):
    transfer = Is(kv_load_failure_policy=policy, get_from_extra_config=lambda name, other: compat)
    config = Is(kv_transfer_config=transfer, cache_config=Is(enable_prefix_caching=caching),
                model_config=Is(model=model))
    try: guard.check_settings(config, reads)
    except guard.GuardError as error: return str(error)
root = Path({str(bundle.folder)!r})
def files(folder, task=None, adapter=None):
    found = guard.BundleFiles(root)
    try:
        if task: found.check_adapter(task, root / adapter)
        else: found.check_folder(root / folder)
    except guard.GuardError as error: return str(error)
print(json.dumps(dict(
    fine=problem(), preempted=problem(num_preemptions=1), own_cache=problem(computed=128),
    short=problem(prompt_token_ids=[1]),
    settings=settings(), recompute=settings(policy="recompute"), compat=settings(compat=False),
    caching=settings(caching=True), prefill_caching=settings(caching=True, reads=True),
    path=settings(model="/somewhere"),
    decode=files("decode"), base=files("base"), records=files("nothing"),
    adapter=files("", "math", "prefill/math"), swapped=files("", "math", "prefill/tools"),
)))
"""
    python = find_serving_environment().python
    found = subprocess.run([str(python), "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_a_preempted_request_and_a_cache_of_its_own_are_refused(answers: Any) -> None:
    assert answers["fine"] is None
    assert answers["preempted"] == "it was preempted, and its cache is gone"
    assert answers["own_cache"] == "128 tokens come from this worker's own cache"
    assert answers["short"] == "the cache has 3 of 1 prompt tokens"


def test_settings_that_let_a_decoder_read_prompts_start_no_worker(answers: Any) -> None:
    assert answers["settings"] is None
    assert answers["prefill_caching"] is None
    assert "kv_load_failure_policy recompute, not fail" in answers["recompute"]
    assert "enforce_handshake_compat is off" in answers["compat"]
    assert "prefix caching is on" in answers["caching"]
    assert "--model /somewhere, not ./" in answers["path"]


def test_only_the_bundles_own_files_are_served(answers: Any) -> None:
    assert (answers["decode"], answers["base"], answers["adapter"]) == (None, None, None)
    assert "not the bundle's files" in answers["records"]
    assert "prefill/tools is not the bundle's for math" in answers["swapped"]
