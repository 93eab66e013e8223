"""The serve job: a verified bundle, its workers here or elsewhere, and the router before them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qsun.bundle import Bundle, read_bundle
from qsun.config import ServeConfig
from qsun.environments import find_serving_environment
from qsun.errors import OutputError
from qsun.launch_spec import LaunchSpec, launch_spec
from qsun.serve.external import External, follow, read_external
from qsun.serve.keys import Keys, read_keys
from qsun.serve.plan import VISIBLE_GPUS, on_gpus, serving_plan, with_caches
from qsun.serve.pool import Pool
from qsun.verdict import require_verdict

LEVELS = ("static", "numeric")
LOOPBACK = "127.0.0.1"
PORT = 8000


@dataclass(frozen=True)
class Request:
    """What is to be served, how, and what the user takes responsibility for (`allowed`).

    `cache_bytes` is the size of every worker's KV cache; None leaves it to vLLM.
    """

    bundle: Path
    decode: int = 1
    prefill: Mapping[str, int] | None = None
    external: Path | None = None
    host: str | None = None
    port: int | None = None
    api_keys: Path | None = None
    admin_keys: Path | None = None
    logs: Path | None = None
    cache_bytes: int | None = None
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """Everything checked: a plan of local workers, or where others are."""

    bundle: Bundle
    plan: LaunchSpec | None
    python: Path | None
    external: External | None
    host: str
    port: int
    keys: Keys
    admin_keys: Keys
    logs: Path | None


def prepare_serve(request: Request) -> Prepared:
    """Check everything that can be wrong before a worker is started.

    Raises:
        IncompatibleError: no bundle, one without a verdict that passes, or that vLLM cannot serve.
        ConfigError: tasks, keys, files or addresses that are wrong.
        ServingEnvironmentError: no vLLM to start workers with.
    """
    bundle = read_bundle(request.bundle.absolute())
    require_verdict(bundle, LEVELS, request.allowed)
    keys = read_keys(request.api_keys) if request.api_keys else Keys()
    admin_keys = read_keys(request.admin_keys) if request.admin_keys else Keys()
    external, plan, python = None, None, None
    if request.external is not None:
        external = read_external(request.external, list(bundle.prefill))
    else:
        serving = find_serving_environment()
        spec = launch_spec(bundle.manifest, "cpu" if serving.on_cpu else "gpu")
        plan = serving_plan(spec, request.decode, request.prefill or {})
        plan = with_caches(plan, request.cache_bytes) if request.cache_bytes else plan
        plan = plan if serving.on_cpu else on_gpus(plan, _gpus())
        python = serving.python
    return Prepared(
        bundle=bundle,
        plan=plan,
        python=python,
        external=external,
        host=request.host or (external.host if external else LOOPBACK),
        port=request.port or (external.port if external else PORT),
        keys=keys,
        admin_keys=admin_keys,
        logs=request.logs,
    )


def run_serve(
    prepared: Prepared, limits: ServeConfig, announce_ready: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT; `announce_ready` gets the address once every task is served.

    Raises:
        ConfigError: the port is taken.
        ServingEnvironmentError: a worker did not start; says vLLM's own reason.
        OutputError: the logs cannot be written.
    """
    import uvloop

    from qsun.serve.launch import LocalWorkers
    from qsun.serve.run import Listening, serve
    from qsun.serve.table import WorkerTable

    listening = Listening(prepared.host, prepared.port, prepared.keys, prepared.admin_keys)
    if prepared.plan is not None and prepared.python is not None:
        local = LocalWorkers(
            prepared.plan, prepared.bundle.folder, prepared.python, _logs(prepared)
        )
        addresses = local.addresses

        async def background(pool: Pool) -> None:
            await local.supervise(pool, limits.start_timeout_s)
    else:
        assert prepared.external is not None, "prepare_serve gives a plan or external workers"
        others, addresses = prepared.external, []

        async def background(pool: Pool) -> None:
            await follow(others, pool)

    with WorkerTable() as table:
        said = False

        def changed(pool: Pool) -> None:
            nonlocal said
            table.changed(pool)
            if not said and pool.decode() and all(map(pool.prefill, prepared.bundle.prefill)):
                said = True
                announce_ready(f"http://{prepared.host}:{prepared.port}/v1")

        uvloop.run(serve(prepared.bundle, addresses, background, listening, limits, changed))


def _logs(prepared: Prepared) -> Path:
    try:
        if prepared.logs is None:
            return Path(tempfile.mkdtemp(prefix=f"qsun-serve-{prepared.bundle.manifest.name}-"))
        prepared.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write the workers' logs: {error}") from error
    return prepared.logs


def _gpus() -> list[str]:
    """The GPUs that this process may use, without loading anything that opens them."""
    visible = os.environ.get(VISIBLE_GPUS)
    if visible is not None:
        return [one.strip() for one in visible.split(",") if one.strip()]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
