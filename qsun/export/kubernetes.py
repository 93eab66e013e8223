"""The Kubernetes manifests: a Deployment and a Service for each worker and for the router."""

from __future__ import annotations

import hashlib
from typing import Any

from qsun.export.containers import (
    BUNDLE,
    GROUP,
    GUARD_FILE,
    GUARD_FOLDER,
    HEALTH,
    PORT,
    SCRATCH_FOLDERS,
    SIDE_CHANNEL_HOST,
    START_S,
    STOP_S,
    USER,
    Container,
    guard_source,
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
    guard = _guard(labels)
    manifests = [_network_policy(labels), guard]
    for container in [*worker_containers(spec), router_container()]:
        own = labels | {ROLE: container.role, "qsun/container": container.name}
        pod = _pod(container, guard["metadata"]["name"])
        manifests += [_service(container, own), _deployment(container, own, pod)]
    return manifests


def _guard(labels: dict[str, str]) -> dict[str, Any]:
    """The guard's source. Another one has another name, so that no pod gets it while it runs."""
    source = guard_source()
    digest = hashlib.sha256(source.encode()).hexdigest()
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"guard-{digest[:8]}", "labels": labels},
        "immutable": True,
        "data": {GUARD_FILE: source},
    }


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


def _deployment(
    container: Container, labels: dict[str, str], pod: dict[str, Any]
) -> dict[str, Any]:
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
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _pod(container: Container, guard: str) -> dict[str, Any]:
    claim = {"claimName": BUNDLE_CLAIM, "readOnly": True}
    volumes: list[dict[str, Any]] = [{"name": "bundle", "persistentVolumeClaim": claim}]
    mounts: list[dict[str, Any]] = [{"name": "bundle", "mountPath": BUNDLE, "readOnly": True}]
    for number, path in enumerate(SCRATCH_FOLDERS):
        volumes.append({"name": f"scratch-{number}", "emptyDir": {}})
        mounts.append({"name": f"scratch-{number}", "mountPath": path})
    if container.gpus:
        memory = {"medium": "Memory", "sizeLimit": "2Gi"}
        volumes.append({"name": "shared-memory", "emptyDir": memory})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    if container.is_guarded:
        volumes.append({"name": "guard", "configMap": {"name": guard}})
        mounts.append({"name": "guard", "mountPath": GUARD_FOLDER, "readOnly": True})
    return {
        "automountServiceAccountToken": False,
        # Services' variables could be taken for settings.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": STOP_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": GROUP,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(container, mounts)],
        "volumes": volumes,
    }


def _container(container: Container, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": container.role,
        "image": container.image,
        "workingDir": container.folder,
        "command": [container.command[0]],
        "args": list(container.command[1:]),
        "env": _environment(container),
        "ports": [{"name": "http", "containerPort": PORT}],
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": _probe(HEALTH, START_PERIOD_S, failures=START_S // START_PERIOD_S),
        "readinessProbe": _probe(container.ready, 5, failures=2),
        "livenessProbe": _probe(HEALTH, 10, failures=6),
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


def _probe(path: str, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
