"""The serving files: valid by their own schemas, exactly vLLM's arguments, closed to clients."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from qsun.bundle import Manifest
from qsun.config import ServeConfig
from qsun.errors import IncompatibleError
from qsun.export.containers import PORT
from qsun.export.serving_files import write_serving_files
from qsun.launch_spec import LAUNCH_SPEC, launch_spec, read_launch_spec
from qsun.serve.external import read_external
from qsun.verify.static.serving_files import compare_serving
from tests.manifests import manifest, prefill_module

WORKERS = ("prefill", "prefill-code-v2", "prefill-sql", "decode")
KUBERNETES_VERSIONS = ("1.30", "1.37")
GUARD = Path(__file__).parent.parent / "qsun/guard/qsun_guard.py"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bundle")
    write_serving_files(made, manifest())
    return made


@pytest.fixture(scope="module")
def compose(folder: Path) -> Document:
    loaded: Document = yaml.safe_load((folder / "serving/compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[Document]:
    return list(yaml.safe_load_all((folder / "serving/kubernetes.yaml").read_text()))


def compose_schema() -> Document:
    """The Compose Specification's own schema, out of a package that is installed as data."""
    found = find_spec("check_jsonschema")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0], "builtin_schemas/vendor/compose-spec.json")
    schema: Document = json.loads(path.read_text())
    return schema


def check_compose(document: Document) -> None:
    schema = compose_schema()
    jsonschema.validators.validator_for(schema)(schema).validate(document)


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    """The manifests of a kind by name."""
    return {one["metadata"]["name"]: one for one in documents if one["kind"] == kind}


def pods(documents: list[Document]) -> dict[str, Document]:
    """Every Deployment's pod template by the Deployment's name."""
    return {name: one["spec"]["template"] for name, one in of_kind(documents, "Deployment").items()}


def container(pod: Document) -> Document:
    (found,) = pod["spec"]["containers"]
    made: Document = found
    return made


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod with these labels; `In` alone is known."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    assert all(one["operator"] == "In" for one in selector.get("matchExpressions", []))
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_manifest_is_valid(documents: list[Document], version: str) -> None:
    assert len(documents) == 2 + 2 * (len(WORKERS) + 1)
    for document in documents:
        assert kubernetes_validate.validate(document, version, strict=True) == version


def misspelt_probe(deployment: Document) -> None:
    found = container(deployment["spec"]["template"])
    found["readynessProbe"] = found.pop("readinessProbe")


def port_in_words(deployment: Document) -> None:
    container(deployment["spec"]["template"])["ports"][0]["containerPort"] = "eight thousand"


def no_selector(deployment: Document) -> None:
    del deployment["spec"]["selector"]


@pytest.mark.parametrize("damage", [misspelt_probe, port_in_words, no_selector])
def test_a_broken_manifest_is_found(
    documents: list[Document], damage: Callable[[Document], None]
) -> None:
    deployment = copy.deepcopy(of_kind(documents, "Deployment")["decode"])
    damage(deployment)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES_VERSIONS[0], strict=True)


def test_the_compose_file_is_valid(compose: Document) -> None:
    check_compose(compose)
    assert list(compose["services"]) == [*WORKERS, "router"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("imge", "vllm"), ("healthcheck", {"test": 5}), ("ports", "8000"), ("networks", 3)],
)
def test_a_broken_compose_file_is_found(compose: Document, key: str, value: Any) -> None:
    broken = copy.deepcopy(compose)
    broken["services"]["decode"][key] = value
    with pytest.raises(jsonschema.ValidationError):
        check_compose(broken)


def test_both_start_vllm_with_the_spec_s_arguments(
    compose: Document, documents: list[Document]
) -> None:
    for worker in launch_spec(manifest(), "gpu").workers:
        service, pod = compose["services"][worker.name], container(pods(documents)[worker.name])
        wanted = (
            *("python3", "-m", "vllm.entrypoints.openai.api_server", *worker.arguments),
            *("--host", "0.0.0.0", "--port", str(PORT)),
        )
        assert (*service["entrypoint"], *service["command"]) == wanted
        assert (*pod["command"], *pod["args"]) == wanted
        assert service["working_dir"] == pod["workingDir"] == f"/bundle/{worker.folder}"
        in_pod = {one["name"]: one.get("value") for one in pod["env"]}
        changed = {"VLLM_NIXL_SIDE_CHANNEL_HOST"}
        for name in worker.environment.keys() - changed:
            assert service["environment"][name] == in_pod[name] == worker.environment[name]


def test_a_worker_tells_the_others_an_address_of_its_own(
    compose: Document, documents: list[Document]
) -> None:
    for name in WORKERS:
        service = compose["services"][name]
        assert service["environment"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == service["hostname"] == name
        (found,) = (
            one
            for one in container(pods(documents)[name])["env"]
            if one["name"] == "VLLM_NIXL_SIDE_CHANNEL_HOST"
        )
        assert found["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_the_local_spec_is_for_a_cpu(folder: Path) -> None:
    assert read_launch_spec(folder / "serving/launch.json") == launch_spec(manifest(), "cpu")


def test_the_workers_list_has_addresses_that_exist(
    folder: Path, compose: Document, documents: list[Document]
) -> None:
    found = json.loads((folder / "serving/workers.json").read_text())
    spec = launch_spec(manifest(), "gpu")
    assert [(one["name"], one["role"], tuple(one["tasks"])) for one in found["workers"]] == [
        (worker.name, worker.role, worker.tasks) for worker in spec.workers
    ]
    services = of_kind(documents, "Service")
    for one in found["workers"]:
        assert one["url"] == f"http://{one['name']}:{PORT}"
        assert one["name"] in compose["services"]
        assert services[one["name"]]["spec"]["ports"][0]["port"] == PORT
    assert "Clients must never reach them" in found["note"]
    router = [
        *compose["services"]["router"]["entrypoint"],
        *compose["services"]["router"]["command"],
    ]
    in_pod = container(pods(documents)["router"])
    assert router == [*in_pod["command"], *in_pod["args"]]
    assert router == ["qsun", "serve", "/bundle", "--external", "/bundle/serving/workers.json"]


def test_the_router_reads_the_workers_list(folder: Path) -> None:
    """What `qsun serve --external` makes of it: its own reader takes the exported file."""
    tasks = [module.task for module in manifest().prefill]
    found = read_external(folder / "serving/workers.json", tasks)
    assert (found.host, found.port) == ("0.0.0.0", PORT)
    assert [one.name for one in found.workers] == list(WORKERS)


def test_compose_mounts_the_guard_in_every_worker(compose: Document, folder: Path) -> None:
    (config,) = compose["configs"].items()
    name, source = config
    # With `content`, Compose starts no service whose file system is read-only.
    assert source.keys() == {"file"}
    assert (folder / "serving" / source["file"]).read_bytes() == GUARD.read_bytes()
    for worker in WORKERS:
        service = compose["services"][worker]
        assert service["configs"] == [{"source": name, "target": "/guard/qsun_guard.py"}]
        assert service["environment"]["PYTHONPATH"] == "/guard"
        assert service["read_only"]
    router = compose["services"]["router"]
    assert "configs" not in router
    assert "PYTHONPATH" not in router["environment"]


def test_kubernetes_mounts_the_guard_in_every_worker(documents: list[Document]) -> None:
    ((name, guard),) = of_kind(documents, "ConfigMap").items()
    assert guard["data"] == {"qsun_guard.py": GUARD.read_text(encoding="utf-8")}
    assert guard["immutable"]
    for worker, pod in pods(documents).items():
        volumes = [one for one in pod["spec"]["volumes"] if "configMap" in one]
        mounts = [one for one in container(pod)["volumeMounts"] if one["mountPath"] == "/guard"]
        paths = [one["value"] for one in container(pod)["env"] if one["name"] == "PYTHONPATH"]
        if worker == "router":
            assert volumes == mounts == paths == []
            continue
        assert volumes == [{"name": mounts[0]["name"], "configMap": {"name": name}}]
        assert mounts[0]["readOnly"]
        assert paths == ["/guard"]


def test_another_guard_has_another_name(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsun.export.kubernetes.guard_source", lambda: "# another\n")
    write_serving_files(tmp_path, manifest())
    others = list(yaml.safe_load_all((tmp_path / "serving/kubernetes.yaml").read_text()))
    (name,), (other,) = of_kind(documents, "ConfigMap"), of_kind(others, "ConfigMap")
    assert name != other
    for kind in ("Service", "NetworkPolicy"):
        assert of_kind(documents, kind) == of_kind(others, kind)


def test_compose_interpolates_the_router_s_address_alone(folder: Path) -> None:
    text = (folder / "serving/compose.yaml").read_text()
    assert text.count("$") == text.count("${QSUN_ADDRESS:-127.0.0.1}") == 1


def test_the_guard_s_settings_are_those_of_its_worker(folder: Path, tmp_path: Path) -> None:
    assert "workers" in compare_serving(folder, manifest())
    for role, changed, problem in (
        ("decode", {"kv_connector_module_path": None}, "is None, not the guard"),
        ("prefill", {"kv_connector_module_path": "other"}, "is other, not the guard"),
        ("decode", extra(qsun_role="prefill"), "qsun_role is prefill, not decode"),
        ("decode", {"kv_connector_extra_config": None}, "qsun_role is None, not decode"),
        ("prefill", extra(qsun_bundle="../.."), r"qsun_bundle is \.\./\.\., not the bundle"),
        ("decode", extra(qsun_bundle="../base"), r"qsun_bundle is \.\./base, not the bundle"),
    ):
        broken = shutil.copytree(folder, tmp_path / "bundle", dirs_exist_ok=True)
        change_transfer(broken / LAUNCH_SPEC, role, changed)
        with pytest.raises(IncompatibleError, match=problem):
            compare_serving(broken, manifest())


def extra(**changed: str) -> Document:
    known = {"enforce_handshake_compat": True, "qsun_role": "decode", "qsun_bundle": ".."}
    return {"kv_connector_extra_config": known | changed}


def change_transfer(path: Path, role: str, changed: Document) -> None:
    """Change what the connectors of a role's workers are told."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    for worker in spec["workers"]:
        if worker["role"] == role:
            place = worker["arguments"].index("--kv-transfer-config") + 1
            config = json.loads(worker["arguments"][place]) | changed
            worker["arguments"][place] = json.dumps(config)
    path.write_text(json.dumps(spec), encoding="utf-8")


def test_compose_publishes_the_router_s_port_alone(compose: Document) -> None:
    services, networks = compose["services"], compose["networks"]
    assert [name for name, one in services.items() if "ports" in one] == ["router"]
    assert services["router"]["ports"] == ["${QSUN_ADDRESS:-127.0.0.1}:8000:8000"]
    for name in WORKERS:
        assert [networks[one].get("internal") for one in services[name]["networks"]] == [True]
        assert "network_mode" not in services[name]
    assert set(services["router"]["depends_on"]) == set(WORKERS)


def test_every_compose_worker_has_a_gpu_of_its_own(compose: Document) -> None:
    devices = [
        compose["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        for name in WORKERS
    ]
    assert [one["device_ids"] for (one,) in devices] == [["0"], ["1"], ["2"], ["3"]]
    assert "deploy" not in compose["services"]["router"]


def test_compose_services_can_change_nothing(compose: Document) -> None:
    for service in compose["services"].values():
        assert service["read_only"]
        assert service["user"] == "2000:0"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert [(one["target"], one["read_only"]) for one in service["volumes"]] == [
            ("/bundle", True)
        ]
        # Kernels compiled at run time are loaded from these.
        assert all(":exec" in one for one in service["tmpfs"])


def test_compose_asks_whether_a_service_may_be_asked(compose: Document) -> None:
    for name, service in compose["services"].items():
        kind, interpreter, option, program = service["healthcheck"]["test"]
        assert (kind, interpreter, option) == ("CMD", "python3", "-c")
        compile(program, name, "exec")
        path = "/ready" if name == "router" else "/health"
        assert f"'http://127.0.0.1:{PORT}{path}'" in program


def test_the_router_has_time_to_let_answers_end(
    compose: Document, documents: list[Document]
) -> None:
    for name, pod in pods(documents).items():
        seconds = pod["spec"]["terminationGracePeriodSeconds"]
        assert compose["services"][name]["stop_grace_period"] == f"{seconds}s"
        assert seconds > ServeConfig().drain_s


def allowed(
    documents: list[Document],
    source: str,
    target: str,
    directions: Sequence[str] = ("ingress", "egress"),
) -> set[int]:
    """Ports of one pod that another may connect to, by the policies that select either."""
    found, templates = set(range(1, 65536)), pods(documents)
    labels = {name: templates[name]["metadata"]["labels"] for name in (source, target)}
    for policy in of_kind(documents, "NetworkPolicy").values():
        for own, other, rules, peers, kind in (
            (target, source, "ingress", "from", "Ingress"),
            (source, target, "egress", "to", "Egress"),
        ):
            if rules not in directions or not selects(policy["spec"]["podSelector"], labels[own]):
                continue
            assert kind in policy["spec"]["policyTypes"]
            ports: set[int] = set()
            for rule in policy["spec"][rules]:
                if any(selects(peer["podSelector"], labels[other]) for peer in rule[peers]):
                    ports |= set(rule_ports(rule))
            found &= ports
    return found


def rule_ports(rule: Document) -> Iterator[int]:
    for port in rule["ports"]:
        yield from range(port["port"], port.get("endPort", port["port"]) + 1)


def test_the_router_alone_reaches_the_workers_api(documents: list[Document]) -> None:
    for name in WORKERS:
        assert allowed(documents, "router", name) == {PORT}
        for other in WORKERS:
            # Either end would do: a network may enforce but one.
            for directions in (["ingress"], ["egress"]):
                found = allowed(documents, other, name, directions)
                assert found == set(range(1, 65536)) - {PORT}
        assert allowed(documents, name, "router") == set()


def test_strangers_reach_no_worker(documents: list[Document]) -> None:
    stranger = copy.deepcopy(of_kind(documents, "Deployment")["router"])
    stranger["metadata"]["name"] = "stranger"
    stranger["spec"]["template"]["metadata"]["labels"] = {"app": "stranger"}
    for name in WORKERS:
        assert allowed([*documents, stranger], "stranger", name) == set()


def test_a_service_selects_the_pods_of_its_name(documents: list[Document]) -> None:
    templates = pods(documents)
    for name, service in of_kind(documents, "Service").items():
        spec = service["spec"]
        chosen = [
            other
            for other, template in templates.items()
            if selects({"matchLabels": spec["selector"]}, template["metadata"]["labels"])
        ]
        assert chosen == [name]
        assert spec["ports"][0]["targetPort"] == container(templates[name])["ports"][0]["name"]
        assert spec.get("clusterIP") == (None if name == "router" else "None")
        assert "type" not in spec, "none is reachable from outside the cluster"


def test_deployments_select_their_own_pods(documents: list[Document]) -> None:
    for name, deployment in of_kind(documents, "Deployment").items():
        spec = deployment["spec"]
        assert selects(spec["selector"], spec["template"]["metadata"]["labels"])
        assert spec["replicas"] == (2 if name == "decode" else 1)


def test_pods_can_change_nothing(documents: list[Document]) -> None:
    for pod in pods(documents).values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 2000,
            "runAsGroup": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_pods_mount_the_bundle_and_room_to_write(documents: list[Document]) -> None:
    for name, pod in pods(documents).items():
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        mounts = {one["mountPath"]: one for one in container(pod)["volumeMounts"]}
        assert {one["name"] for one in mounts.values()} == volumes.keys()
        assert mounts["/bundle"]["readOnly"]
        assert volumes["bundle"]["persistentVolumeClaim"] == {
            "claimName": "qsun-bundle",
            "readOnly": True,
        }
        assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
        homes = [one["value"] for one in container(pod)["env"] if one["name"] == "HOME"]
        assert [mounts[home]["name"] in volumes for home in homes] == [True]
        assert ("/dev/shm" in mounts) == (name != "router")


def test_workers_get_a_gpu_and_are_asked_for_their_health(documents: list[Document]) -> None:
    for name, pod in pods(documents).items():
        found = container(pod)
        gpus = {"nvidia.com/gpu": 1}
        wanted = None if name == "router" else {"requests": gpus, "limits": gpus}
        assert found.get("resources") == wanted
        ready = "/ready" if name == "router" else "/health"
        for probe, path in (
            ("startupProbe", "/health"),
            ("readinessProbe", ready),
            ("livenessProbe", "/health"),
        ):
            assert found[probe]["httpGet"] == {"path": path, "port": "http"}
        start = found["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 900


def test_images_are_pinned(compose: Document, documents: list[Document]) -> None:
    for name, pod in pods(documents).items():
        image = container(pod)["image"]
        assert image == compose["services"][name]["image"]
        assert image.rpartition(":")[2] not in ("", "latest")


@pytest.mark.parametrize("name", ["SmolLM2 (135M)_w4", "!", "x" * 90])
def test_any_name_becomes_a_project_and_a_label(tmp_path: Path, name: str) -> None:
    write_serving_files(tmp_path, manifest(name=name))
    check_compose(yaml.safe_load((tmp_path / "serving/compose.yaml").read_text()))
    for document in yaml.safe_load_all((tmp_path / "serving/kubernetes.yaml").read_text()):
        label = document["metadata"]["labels"]["app.kubernetes.io/instance"]
        assert 0 < len(label) <= 63
        assert label.replace("-", "").isalnum()


def test_a_bundle_that_cannot_be_served_leaves_no_file(tmp_path: Path) -> None:
    refused: Manifest = manifest(prefill=(prefill_module("a", boundary="n"),))
    with pytest.raises(IncompatibleError, match="tuned for boundary n"):
        write_serving_files(tmp_path, refused)
    assert list(tmp_path.iterdir()) == []
