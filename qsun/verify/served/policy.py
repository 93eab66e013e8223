"""The policy of a launch spec: does anything in it let the decode module read prompts by itself?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qsun.launch_arguments import GUARD_MODULE
from qsun.launch_spec import LaunchSpec, WorkerSpec
from qsun.verdict import Check, Outcome
from qsun.verify.static.serving_files import value_of, values_of
from qsun.verify.steps import enumerated

NAME = "served.policy"
COMPARED = "what the launch spec has workers do where a hand-off fails"
REMEDY = "Start the workers as the exported launch spec says; export the bundle again."
CONNECTOR = "NixlConnector"
# Each role must be able to do its part; `kv_both` is what vLLM calls either.
ROLES = {"prefill": ("kv_both", "kv_producer"), "decode": ("kv_both", "kv_consumer")}


def policy_check(spec: LaunchSpec) -> Check:
    """Whether a failed hand-off is an error for every worker, decided from the spec alone."""
    wrong = [
        f"{worker.name}: {problem}" for worker in spec.workers for problem in _problems(worker)
    ]
    if wrong:
        return Check(NAME, Outcome.FAILED, COMPARED, enumerated(wrong), REMEDY)
    message = f"all {len(spec.workers)} workers hand over by {CONNECTOR}, and fail where that fails"
    return Check(NAME, Outcome.PASSED, COMPARED, message)


def _problems(worker: WorkerSpec) -> Iterator[str]:
    config = _transfer_config(worker)
    if config.get("kv_connector") != CONNECTOR:
        yield f"its connector is {config.get('kv_connector')}, not {CONNECTOR}"
        return
    if config.get("kv_connector_module_path") != GUARD_MODULE:
        yield f"its connector is not the guard, {GUARD_MODULE}"
    if config.get("kv_role") not in ROLES[worker.role]:
        yield f"kv_role {config.get('kv_role')} is not for a {worker.role} worker"
    # Not every version of vLLM has this as its default: it has to be said.
    if config.get("kv_load_failure_policy") != "fail":
        yield f"kv_load_failure_policy {config.get('kv_load_failure_policy')}, not fail"
    extra = config.get("kv_connector_extra_config") or {}
    if extra.get("enforce_handshake_compat", True) is not True:
        yield "enforce_handshake_compat is off: caches of other shapes are not refused"
    if worker.role == "decode" and values_of(worker, "--no-enable-prefix-caching") is None:
        yield "--no-enable-prefix-caching is missing: its own cached responses become prompts"


def _transfer_config(worker: WorkerSpec) -> dict[str, Any]:
    try:
        value = json.loads(value_of(worker, "--kv-transfer-config") or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
