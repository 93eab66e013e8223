"""The served level: the launch spec's own workers, started, asked and compared with this process.

A mistake that a deployment would make unnoticed, with status 200 and plausible text, has to show
here: a decode module that reads prompts by itself, or another prefill module under a task's name.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from qsun.bundle import Bundle
from qsun.disaggregation import WrittenAs
from qsun.environments import ServingEnvironment
from qsun.errors import IncompatibleError, ServingEnvironmentError
from qsun.kv_layout import DTYPE_BYTES
from qsun.launch_spec import LAUNCH_SPEC, LaunchSpec, read_launch_spec
from qsun.progress import announce
from qsun.references import read_references
from qsun.verdict import Check, Outcome
from qsun.verify.served.answers import Pair, Served, ask_pair
from qsun.verify.served.in_process import InProcess
from qsun.verify.served.judgement import Judged, ServedCheckConfig, check_names, task_checks
from qsun.verify.served.policy import COMPARED as POLICY_COMPARED
from qsun.verify.served.policy import NAME as POLICY
from qsun.verify.served.policy import policy_check
from qsun.verify.served.prompts import prompts_of_lengths
from qsun.vllm_server import VllmServer
from qsun.workers import running_workers

START = "served.start"
START_COMPARED = "the workers of the launch spec, by starting them"


def served_checks(
    bundle: Bundle,
    serving: ServingEnvironment,
    settings: ServedCheckConfig | None = None,
) -> list[Check]:
    """Start the workers that the bundle's launch spec names, and ask them.

    Nothing is started where the spec's policy lets the decode module read prompts. The workers
    have ended before this process loads a module.

    Raises:
        IncompatibleError: a task has no prompts, or they cannot be read.
    """
    settings = settings or ServedCheckConfig()
    tasks = list(bundle.prefill)
    try:
        spec = read_launch_spec(bundle.folder / LAUNCH_SPEC)
    except IncompatibleError as error:
        policy = Check(POLICY, Outcome.FAILED, POLICY_COMPARED, str(error), "Export it again.")
    else:
        policy = policy_check(spec)
    if policy.outcome is Outcome.FAILED:
        return [policy, *_unchecked(tasks, f"nothing was started, because {POLICY} failed")]
    if (spec.accelerator == "cpu") is not serving.on_cpu:
        found = f"the launch spec is for a {spec.accelerator}, this machine's vLLM is not"
        return [policy, *_unchecked(tasks, found)]
    prompts = task_prompts(bundle, settings)
    announce(f"served: starting {len(spec.workers)} workers")
    try:
        with running_workers(
            bundle.folder, spec, serving.python, settings.start_timeout_s
        ) as workers:
            answers = ask_workers(bundle, spec, workers, prompts, settings)
    except ServingEnvironmentError as error:
        start = Check(START, Outcome.FAILED, START_COMPARED, str(error), "See vLLM's own reason.")
        return [policy, start, *_unchecked(tasks, f"not asked, because {START} failed")]
    message = f"{len(spec.workers)} workers were ready, and ended again"
    start = Check(START, Outcome.PASSED, START_COMPARED, message)
    return [policy, start, *judge(bundle, answers, InProcess(bundle), settings)]


def task_prompts(bundle: Bundle, settings: ServedCheckConfig) -> dict[str, list[tuple[int, ...]]]:
    """Every task's prompts, in tokens; lengths that the bundle does not serve are left out.

    Raises:
        IncompatibleError: a task has no prompts, or they cannot be read.
    """
    manifest = bundle.manifest
    # The next turn's prompt has an answer in it and gets another.
    longest = manifest.max_tokens - 2 * settings.new_tokens
    lengths = [length for length in settings.prompt_tokens if length <= longest]
    return {
        task: prompts_of_lengths(
            read_references(
                bundle.folder / f"verification/{task}.jsonl", manifest.kv_layout["vocabulary"]
            ),
            lengths,
        )
        for task in bundle.prefill
    }


def ask_workers(
    bundle: Bundle,
    spec: LaunchSpec,
    workers: Mapping[str, VllmServer],
    prompts: Mapping[str, Sequence[Sequence[int]]],
    settings: ServedCheckConfig,
) -> dict[str, list[Served]]:
    """Every task's answers, of its prefill worker and its decode worker."""
    run = secrets.token_hex(8)
    return {
        task: ask_pair(
            Pair(
                written=WrittenAs(task, bundle.digest),
                prefill=_worker(spec, workers, "prefill", task),
                decode=_worker(spec, workers, "decode", task),
                salt=f"{task}.{bundle.digest[:16]}.{run}",
            ),
            asked,
            settings.new_tokens,
            settings.next_turn_of,
        )
        for task, asked in prompts.items()
    }


def judge(
    bundle: Bundle,
    answers: Mapping[str, Sequence[Served]],
    reference: InProcess,
    settings: ServedCheckConfig,
) -> list[Check]:
    """The checks of all tasks."""
    checks = []
    for task, served in answers.items():
        announce(f"served: {task} in this process")
        scored = [
            None if one.handed is None else reference.score(task, one.prompt, one.handed.tokens)
            for one in served
        ]
        same = _same_weights(bundle, task)
        judged = Judged(task, served, scored, _bytes_per_token(bundle), same)
        checks += task_checks(judged, settings)
    return checks


def _worker(
    spec: LaunchSpec, workers: Mapping[str, VllmServer], role: str, task: str
) -> VllmServer:
    for worker in spec.workers:
        if worker.role == role and task in worker.tasks:
            return workers[worker.name]
    raise ServingEnvironmentError(f"the launch spec has no {role} worker for {task}")


def _bytes_per_token(bundle: Bundle) -> int:
    layout = bundle.manifest.kv_layout
    values: int = 2 * layout["layers"] * layout["kv_heads"] * layout["head_dim"]
    return values * DTYPE_BYTES[layout["dtype"]]


def _same_weights(bundle: Bundle, task: str) -> bool:
    """Whether the task's prefill module and the decode module are the same files."""
    entry = next(module for module in bundle.manifest.prefill if module.task == task)
    prefill, decode = (
        {
            path.removeprefix(f"{folder}/"): digest
            for path, digest in bundle.manifest.files.items()
            if path.startswith(f"{folder}/") and path.endswith(".safetensors")
        }
        for folder in (entry.path, bundle.manifest.decode_path)
    )
    return bool(prefill) and prefill == decode


def _unchecked(tasks: Sequence[str], message: str) -> list[Check]:
    compared = "the served modules"
    names = [name for task in tasks for name in check_names(task)]
    return [Check(name, Outcome.UNCHECKED, compared, message) for name in names]
