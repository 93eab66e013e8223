"""The Kubernetes manifests: a Deployment and a Service for each worker and for the router."""

from __future__ import annotations

from typing import Any

from qsun.export.containers import (
    BUNDLE,
    GROUP,
    HEALTH,
    PORT,
    SCRATCH_FOLDERS,
    SIDE_CHANNEL_HOST,
    START_S,
    USER,
    Container,
    router_container,
    worker_containers,
)
from qsun.launch_spec import LaunchSpec

BUNDLE_CLAIM = "qsun-bundle"
# With a single one, all tasks stop with it.
DECODE_REPLICAS = 2
ROLE = "app.kubernetes.io/component"
START_PERIOD_S = 10
LAST_PORT = 65535


def kubernetes(spec: LaunchSpec, instance: str) -> list[dict[str, Any]]:
    """All manifests, for a namespace of their own. `instance` is a label's value."""
    labels = {"app.kubernetes.io/name": "qsun", "app.kubernetes.io/instance": instance}
    router = router_container()
    manifests = [_network_policy(labels)]
    for container in [*worker_containers(spec), router]:
        own = labels | {ROLE: container.role, "qsun/container": container.name}
        manifests += [_service(container, own), _deployment(container, own)]
    return manifests


def _network_policy(labels: dict[str, str]) -> dict[str, Any]:
    """Router to workers' API, workers to each other's caches, and nothing else either way."""
    router = {"podSelector": {"matchLabels": labels | {ROLE: "router"}}}
    roles = [{"key": ROLE, "operator": "In", "values": ["prefill", "decode"]}]
    workers = {"podSelector": {"matchLabels": labels, "matchExpressions": roles}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "workers", "labels": labels},
        "spec": {
            **workers,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [router], "ports": [_ports(PORT)]},
                {"from": [workers], "ports": _cache_ports()},
            ],
            "egress": [{"to": [workers], "ports": _cache_ports()}],
        },
    }


def _cache_ports() -> list[dict[str, Any]]:
    """Every port but the API's: NIXL's data connections choose theirs themselves."""
    return [_ports(1, PORT - 1), _ports(PORT + 1, LAST_PORT)]


def _ports(first: int, last: int | None = None) -> dict[str, Any]:
    return {"protocol": "TCP", "port": first} | ({} if last is None else {"endPort": last})


def _service(container: Container, labels: dict[str, str]) -> dict[str, Any]:
    # A worker's name resolves to its pods' own addresses: the router chooses among them.
    headless = {} if container.role == "router" else {"clusterIP": "None"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": container.name, "labels": labels},
        "spec": {
            **headless,
            "selector": labels,
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    }


def _deployment(container: Container, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": container.name, "labels": labels},
        "spec": {
            "replicas": DECODE_REPLICAS if container.role == "decode" else 1,
            "selector": {"matchLabels": labels},
            # No GPU is kept free for a pod that comes before another has gone.
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
            },
            "template": {"metadata": {"labels": labels}, "spec": _pod(container)},
        },
    }


def _pod(container: Container) -> dict[str, Any]:
    scratch = {f"scratch-{number}": path for number, path in enumerate(SCRATCH_FOLDERS)}
    volumes: list[dict[str, Any]] = [{"name": name, "emptyDir": {}} for name in scratch]
    if container.gpus:
        scratch["shared-memory"] = "/dev/shm"
        volumes.append(
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
        )
    claim = {"claimName": BUNDLE_CLAIM, "readOnly": True}
    return {
        "automountServiceAccountToken": False,
        # Services' variables could be taken for settings.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": GROUP,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(container, scratch)],
        "volumes": [{"name": "bundle", "persistentVolumeClaim": claim}, *volumes],
    }


def _container(container: Container, scratch: dict[str, str]) -> dict[str, Any]:
    mounts = [{"name": name, "mountPath": path} for name, path in scratch.items()]
    found: dict[str, Any] = {
        "name": container.role,
        "image": container.image,
        "workingDir": container.folder,
        "command": [container.command[0]],
        "args": list(container.command[1:]),
        "env": _environment(container),
        "ports": [{"name": "http", "containerPort": PORT}],
        "volumeMounts": [{"name": "bundle", "mountPath": BUNDLE, "readOnly": True}, *mounts],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": _probe(START_PERIOD_S, failures=START_S // START_PERIOD_S),
        "readinessProbe": _probe(5, failures=2),
        "livenessProbe": _probe(10, failures=6),
    }
    if container.gpus:
        gpus = {"nvidia.com/gpu": container.gpus}
        found["resources"] = {"requests": gpus, "limits": gpus}
    return found


def _environment(container: Container) -> list[dict[str, Any]]:
    pod_address = {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return [
        {"name": name} | (pod_address if name == SIDE_CHANNEL_HOST else {"value": value})
        for name, value in container.environment.items()
    ]


def _probe(period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": HEALTH, "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
