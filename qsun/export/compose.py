"""The Docker Compose file: every worker and the router on one host, one GPU a worker."""

from __future__ import annotations

from typing import Any

from qsun.export.containers import (
    BUNDLE,
    GROUP,
    GUARD_FILE,
    GUARD_FOLDER,
    PORT,
    SCRATCH_FOLDERS,
    SIDE_CHANNEL_HOST,
    START_S,
    STOP_S,
    USER,
    Container,
    router_container,
    worker_containers,
)
from qsun.launch_arguments import GUARD_MODULE
from qsun.launch_spec import LaunchSpec

WORKERS_NETWORK = "workers"
CLIENTS_NETWORK = "clients"
# Beside the Compose file. Not `content` in it: Compose copies that into the container, and does not
# start one whose file system is read-only. Not `.py`: a bundle holds nothing that Python imports.
GUARD_TEXT = f"{GUARD_MODULE}.txt"


def compose(spec: LaunchSpec, project: str) -> dict[str, Any]:
    """The Compose model. Workers are on an internal network; the router's port is published."""
    workers = worker_containers(spec)
    services = {worker.name: _worker(worker, gpu) for gpu, worker in enumerate(workers)}
    router = router_container()
    services[router.name] = _service(router) | {
        "networks": [WORKERS_NETWORK, CLIENTS_NETWORK],
        # Loopback unless told otherwise: the router has no TLS of its own.
        "ports": [f"${{QSUN_ADDRESS:-127.0.0.1}}:{PORT}:{PORT}"],
        "depends_on": {worker.name: {"condition": "service_healthy"} for worker in workers},
    }
    return {
        "name": project,
        "services": services,
        "networks": {WORKERS_NETWORK: {"internal": True}, CLIENTS_NETWORK: {}},
        "configs": {GUARD_MODULE: {"file": f"./{GUARD_TEXT}"}},
    }


def _worker(worker: Container, gpu: int) -> dict[str, Any]:
    # By `count`, Docker would give every container the same first GPU.
    device = {"driver": "nvidia", "device_ids": [str(gpu)], "capabilities": ["gpu"]}
    return _service(worker) | {
        "networks": [WORKERS_NETWORK],
        "configs": [{"source": GUARD_MODULE, "target": f"{GUARD_FOLDER}/{GUARD_FILE}"}],
        "shm_size": "2gb",
        "deploy": {"resources": {"reservations": {"devices": [device]}}},
    }


def _service(container: Container) -> dict[str, Any]:
    return {
        "image": container.image,
        "hostname": container.name,
        "user": f"{USER}:{GROUP}",
        "working_dir": container.folder,
        "entrypoint": [container.command[0]],
        "command": list(container.command[1:]),
        "environment": _environment(container),
        "volumes": [{"type": "bind", "source": "..", "target": BUNDLE, "read_only": True}],
        "read_only": True,
        # Docker mounts tmpfs without exec, but code compiled at run time is loaded from there.
        "tmpfs": [f"{folder}:exec,mode=1777" for folder in SCRATCH_FOLDERS],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _health_check(container.ready)],
            "interval": "10s",
            "timeout": "10s",
            "retries": 6,
            "start_period": f"{START_S}s",
        },
        "restart": "unless-stopped",
        "stop_grace_period": f"{STOP_S}s",
    }


def _health_check(path: str) -> str:
    """A Python program that fails where `path` is not answered with success."""
    url = f"http://127.0.0.1:{PORT}{path}"
    return f"import urllib.request as request; request.urlopen('{url}', timeout=5)"


def _environment(container: Container) -> dict[str, str]:
    if SIDE_CHANNEL_HOST not in container.environment:
        return container.environment
    # The name is bound to by the worker itself and resolved by the others.
    return container.environment | {SIDE_CHANNEL_HOST: container.name}
