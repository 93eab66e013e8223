"""Make `docs/records/gpu-serving-systems.json`: three systems under one load, all on one GPU.

    python -m tests.gpu.serve_systems make STATE [--shape llama-3.1-8b] [--layers N]
    python -m tests.gpu.serve_systems run RECORD STATE [--alphas 0,1,2,3] [--users 32]
        [--seconds 20] [--minutes 9] [--kv-cache 4GiB] [--isolated 4] [--shared 2,1]

`isolated` has a full-precision decode worker for each of four tasks, `sun` fewer that all tasks
share, `qsun` as few quantized ones. All workers of a bundle are started on the same GPU by `qsun
serve`, and each system is a router over as many of them as it has: idle ones cost no time. What a
GPU gives to four decode workers and what to a single one is so compared on the same GPU. A call
makes what is missing and fits in `--minutes`; a bench that was finished is kept in STATE. Prompts
are short beside answers: the prefill worker is on the GPU, too, and every system has one. Each
bench's own record, and latency curves of one decode worker for `qsun simulate`, go to `loads-gpu/`
beside RECORD. QSUN_SERVING_PYTHON names the interpreter that has vLLM.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import torch

from qsun.environments import ServingEnvironment
from qsun.errors import QsunError
from qsun.records import new_record, read_record
from tests.gpu.job_runner import ROOT
from tests.gpu.systems_bundles import BUNDLES, TASKS, made_shape, make
from tests.gpu.systems_figures import figures_of, ratios_of
from tests.gpu.systems_load import Load, Measurement, measurements
from tests.gpu.systems_routers import System, check_environments, routers, show_logs

START_S = 100  # what starting a bundle's workers takes at least
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "0",
    # FlashInfer compiles its sampler at run time.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(asked: argparse.Namespace, load: Load, systems: list[System]) -> None:
    """Make what is missing and fits, then sum up all that is there."""
    state, end = asked.state.resolve(), time.monotonic() + 60 * asked.minutes
    (state / "curves").mkdir(exist_ok=True)
    serving = check_environments()
    of_bundle = {name: [one for one in systems if one.bundle == name] for name in BUNDLES}
    planned = {name: measurements(load, found, state) for name, found in of_bundle.items()}

    def save() -> None:
        every = [one for found in planned.values() for one in found]
        result = {"kv_cache_of_a_worker": asked.kv_cache, **result_of(every, serving, state)}
        new_record("serving-systems", load, 0, result).write(asked.record)

    for name, found in planned.items():
        missing = [one for one in found if not one.done]
        if missing and end - time.monotonic() > START_S + missing[0].needs_s:
            measure(missing, of_bundle[name], state, asked.kv_cache, end, save)
    save()
    loads = asked.record.parent / "loads-gpu"
    loads.mkdir(parents=True, exist_ok=True)
    for one in [one for found in planned.values() for one in found if one.done]:
        shutil.copy(one.out, loads / one.kept_as)
    left = sum(not one.done for found in planned.values() for one in found)
    print(f"{left} measurements are left to be made")


def measure(
    missing: list[Measurement],
    systems: list[System],
    state: Path,
    kv_cache: str,
    end: float,
    save: Callable[[], None],
) -> None:
    """Start a bundle's workers and routers, make what fits before `end`, and save after each."""
    bundle, logs = missing[0].system.bundle, state / "logs" / missing[0].system.bundle
    begun = time.monotonic()
    try:
        with routers(state / "bundles" / bundle, systems, logs, kv_cache, end) as urls:
            print(f"{bundle} is served after {time.monotonic() - begun:.0f} s", flush=True)
            for one in missing:
                if end - time.monotonic() > one.needs_s:
                    one.run(urls[one.system.name], end)
                    save()
    except (QsunError, TimeoutError, httpx.HTTPError) as error:
        print(f"{bundle} is not served: {error}", flush=True)
        show_logs(logs)


def result_of(every: list[Measurement], serving: ServingEnvironment, state: Path) -> dict[str, Any]:
    """All that is finished, and the names of what is missing."""
    rows = [
        figures_of(read_record(one.out, "bench"), one.system.name, one.alpha)
        for one in every
        if one.done and one.alpha is not None
    ]
    systems = {one.system.name: one.system for one in every}
    return {
        **made_shape(state),
        "weights": "random",
        "gpus": torch.cuda.device_count() if not serving.on_cpu else 0,
        "serving": serving.versions,
        "workers_started": {
            bundle: {"prefill": 1, "decode": max(decode)}
            for bundle in BUNDLES
            if (decode := [one.decode for one in systems.values() if one.bundle == bundle])
        },
        "systems": {name: asdict(one) for name, one in systems.items()},
        "missing": [str(one.out.relative_to(state)) for one in every if not one.done],
        "curves": [one.out.name for one in every if one.done and one.alpha is None],
        "rows": rows,
        "ratios": ratios_of(rows),
    }


def systems_of(isolated: int, shared: list[int]) -> list[System]:
    """Isolated decode workers, then fewer shared ones of either bundle."""
    found = [System("isolated", "sun", "isolated", isolated)]
    for bundle in BUNDLES:
        found += [System(bundle, bundle, "shared", count) for count in shared]
    return found


def main() -> None:
    """Make the bundles, or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    making = kinds.add_parser("make")
    making.add_argument("state", type=Path)
    making.add_argument("--shape", default="llama-3.1-8b", help="of configs/models, or a file")
    making.add_argument("--layers", type=int)
    running = kinds.add_parser("run")
    running.add_argument("record", type=Path)
    running.add_argument("state", type=Path)
    running.add_argument("--alphas", default="0,1,2,3")
    running.add_argument("--users", type=int, default=32)
    running.add_argument("--seconds", type=float, default=20)
    running.add_argument("--minutes", type=float, default=9)
    running.add_argument("--kv-cache", default="4GiB", help="of each worker")
    running.add_argument("--isolated", type=int, default=len(TASKS))
    running.add_argument("--shared", default="2,1")
    running.add_argument("--prompt-tokens", type=int, default=128)
    running.add_argument("--output-tokens", type=int, default=256)
    running.add_argument("--batches", default="1,2,4,8,16,32", help="of the curves")
    running.add_argument("--contexts", default="512")
    running.add_argument("--prompts", default="128,512,1024")
    asked = parser.parse_args()
    if asked.kind == "make":
        check_environments()
        make(asked.state.resolve(), asked.shape, asked.layers)
        return
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)})
    load = Load(
        tuple(map(float, asked.alphas.split(","))),
        *(asked.users, asked.seconds, asked.prompt_tokens, asked.output_tokens),
        *(
            tuple(map(int, one.split(",")))
            for one in (asked.batches, asked.contexts, asked.prompts)
        ),
    )
    run(asked, load, systems_of(asked.isolated, list(map(int, asked.shared.split(",")))))


if __name__ == "__main__":
    main()
