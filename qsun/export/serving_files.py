"""The serving files of a bundle: launch spec, Compose file, Kubernetes manifests, workers' list.

The Compose file mounts the guard from a text beside it; the manifests hold it themselves.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from qsun.bundle import Manifest
from qsun.export.compose import GUARD_TEXT, compose
from qsun.export.containers import WORKERS_FILE, external_workers, guard_source
from qsun.export.kubernetes import kubernetes
from qsun.files import write_json
from qsun.launch_spec import LAUNCH_SPEC, NOTE, launch_spec

COMPOSE_FILE = "serving/compose.yaml"
KUBERNETES_FILE = "serving/kubernetes.yaml"
GUARD_COPY = f"serving/{GUARD_TEXT}"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def write_serving_files(folder: Path, manifest: Manifest) -> None:
    """Write `serving/` of the bundle in `folder`.

    Raises:
        IncompatibleError: vLLM could not serve the bundle; names every reason.
    """
    local, cluster = launch_spec(manifest, "cpu"), launch_spec(manifest, "gpu")
    (folder / LAUNCH_SPEC).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / LAUNCH_SPEC, local.summary())
    write_json(folder / WORKERS_FILE, external_workers(cluster))
    (folder / GUARD_COPY).write_text(guard_source(), encoding="utf-8")
    name = _label(manifest.name)
    _write_yaml(folder / COMPOSE_FILE, [compose(cluster, name)])
    _write_yaml(folder / KUBERNETES_FILE, kubernetes(cluster, name))


def _label(name: str) -> str:
    """A bundle's name as Compose's project and Kubernetes' label: lower case, at most 63 signs."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower())[:63].strip("-") or "qsun"


def _write_yaml(path: Path, documents: list[dict[str, Any]]) -> None:
    # Copied by way of JSON: PyYAML writes what it meets twice as a reference.
    plain = json.loads(json.dumps(documents))
    text = yaml.dump_all(plain, Dumper=_Dumper, sort_keys=False, width=1000, explicit_start=True)
    path.write_text(f"# {NOTE}\n{text}", encoding="utf-8")
