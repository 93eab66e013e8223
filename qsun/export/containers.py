"""The containers of a deployment, alike for Compose and Kubernetes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qsun import __version__
from qsun.launch_arguments import GUARD_MODULE
from qsun.launch_spec import NOTE, LaunchSpec, WorkerSpec
from qsun.vllm_server import SERVER_MODULE
from qsun.workers import GUARD

# The vLLM whose argument parser the tests ask; later images may take other arguments.
VLLM_IMAGE = "vllm/vllm-openai:v0.32.0"
ROUTER_IMAGE = f"qsun:{__version__}"
# vLLM's image has this user beside root. Its folders for code compiled at run time are mounted.
USER, GROUP = 2000, 0
HOME = "/home/vllm"
SCRATCH_FOLDERS = (HOME, "/tmp")
BUNDLE = "/bundle"
WORKERS_FILE = "serving/workers.json"
GUARD_FOLDER = "/guard"
GUARD_FILE = f"{GUARD_MODULE}.py"
PORT = 8000
HEALTH = "/health"
READY = "/ready"
START_S = 900
"""Longest start: loading from a cold disk, compiling and capturing CUDA graphs."""
STOP_S = 60
"""Longest end: the router first lets answers end, for its `drain_s`."""
SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"


@dataclass(frozen=True)
class Container:
    """One container. `gpus` is how many it gets; `name` is also its host name for the others.

    `ready` is the path that tells whether it may be asked.
    """

    name: str
    role: str
    image: str
    folder: str
    command: tuple[str, ...]
    environment: dict[str, str]
    gpus: int
    ready: str

    @property
    def is_guarded(self) -> bool:
        """Whether the guard lies in `GUARD_FOLDER`: in every worker, nowhere else."""
        return self.role != "router"


def guard_source() -> str:
    """The guard, as vLLM's Python imports it in a worker."""
    return (GUARD / GUARD_FILE).read_text(encoding="utf-8")


def worker_containers(spec: LaunchSpec) -> list[Container]:
    """A container for each worker, started in its module's folder of the mounted bundle."""
    return [_worker(worker) for worker in spec.workers]


def router_container() -> Container:
    """The router's: it alone is to be reached, and reads from `WORKERS_FILE` where workers are."""
    return Container(
        name="router",
        role="router",
        image=ROUTER_IMAGE,
        folder=BUNDLE,
        command=("qsun", "serve", BUNDLE, "--external", f"{BUNDLE}/{WORKERS_FILE}"),
        environment={"HOME": HOME},
        gpus=0,
        ready=READY,
    )


def external_workers(spec: LaunchSpec) -> dict[str, Any]:
    """What `WORKERS_FILE` says: where the router listens, and each worker's tasks and address."""
    return {
        "schema": 1,
        "note": NOTE,
        "router": {"host": "0.0.0.0", "port": PORT},
        "workers": [
            {
                "name": worker.name,
                "role": worker.role,
                "tasks": list(worker.tasks),
                "url": f"http://{worker.name}:{PORT}",
            }
            for worker in spec.workers
        ],
    }


def _worker(worker: WorkerSpec) -> Container:
    return Container(
        name=worker.name,
        role=worker.role,
        image=VLLM_IMAGE,
        folder=f"{BUNDLE}/{worker.folder}",
        command=(
            *("python3", "-m", SERVER_MODULE, *worker.arguments),
            *("--host", "0.0.0.0", "--port", str(PORT)),
        ),
        environment=worker.environment | {"HOME": HOME, "USER": "vllm", "PYTHONPATH": GUARD_FOLDER},
        gpus=1,
        ready=HEALTH,
    )
