"""The launch spec: vLLM takes every argument, and workers fit each other."""

from __future__ import annotations

import json
import posixpath
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qsun.environments import serving_python
from qsun.errors import IncompatibleError
from qsun.export.containers import VLLM_IMAGE
from qsun.launch_arguments import DECODE_STREAMS, GUARD_MODULE, LEASE_S, Accelerator
from qsun.launch_spec import WorkerSpec, launch_spec, read_launch_spec
from tests.manifests import KV_LAYOUT, manifest, prefill_module

# vLLM's own parser, in its own environment; no engine is made. Shortened names are refused, which
# argparse alone would take.
PARSE = """
import json, sys
import vllm
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

class Parser(FlexibleArgumentParser):
    def error(self, message):
        raise ValueError(message)

parser, answers = make_arg_parser(Parser()), []
for arguments in json.load(sys.stdin):
    try:
        options = {one for one in arguments if one.startswith("--")}
        unknown = options - set(parser._option_string_actions)
        if unknown:
            raise ValueError(f"unknown: {unknown}")
        found = parser.parse_args(arguments)
        validate_parsed_serve_args(found)
        transfer = found.kv_transfer_config
        answers.append({
            "model": found.model, "served": found.served_model_name, "rank": found.max_lora_rank,
            "lora": {one.name: one.path for one in found.lora_modules or ()},
            "prefix_caching": found.enable_prefix_caching, "remote_code": found.trust_remote_code,
            "log_requests": found.enable_log_requests, "block_size": found.block_size,
            "policy": transfer.kv_load_failure_policy, "device": transfer.kv_buffer_device,
            "connector": transfer.kv_connector, "extra": transfer.kv_connector_extra_config,
            "module": transfer.kv_connector_module_path, "streams": found.max_num_seqs,
        })
    except (ValueError, TypeError) as error:
        answers.append({"error": str(error)})
print("ANSWERS" + json.dumps([vllm.__version__, answers]))
"""
BROKEN = (
    ["--model", "./", "--disable-log-requests"],
    ["--model", "./", "--max-lora-r", "64"],
    ["--model", "./", "--max-lora-rank", "33"],
    ["--model", "./", "--kv-transfer-config", '{"kv_connector": "NixlConnector"}'],
)


def parse(cases: list[Any]) -> tuple[str, list[dict[str, Any]]]:
    """vLLM's version, and what its parser made of each list of arguments."""
    answer = subprocess.run(
        [serving_python(None), "-c", PARSE],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    version, answers = json.loads(answer.stdout.partition("ANSWERS")[2])
    return str(version), answers


@pytest.fixture(scope="module")
def parsed() -> tuple[str, list[dict[str, Any]]]:
    """Answers for the CPU's four workers, the GPU's four, and what must be refused."""
    workers = [*launch_spec(manifest(), "cpu").workers, *launch_spec(manifest(), "gpu").workers]
    addresses = ["--host", "127.0.0.1", "--port", "8000"]
    return parse([*([*worker.arguments, *addresses] for worker in workers), *BROKEN])


def value(worker: WorkerSpec, argument: str) -> str:
    return worker.arguments[worker.arguments.index(argument) + 1]


def test_vllm_takes_every_argument(parsed: tuple[str, list[dict[str, Any]]]) -> None:
    accepted = parsed[1][: -len(BROKEN)]
    assert [answer for answer in accepted if "error" in answer] == []
    assert [answer["served"] for answer in accepted] == 2 * [
        ["no-task"], ["code.v2"], ["SQL"], ["decode"]
    ]  # fmt: skip
    assert {answer["model"] for answer in accepted} == {"./"}
    assert [answer["prefix_caching"] for answer in accepted] == 2 * [True, True, True, False]
    assert accepted[0]["lora"] == {"math": "../prefill/math", "tools": "../prefill/tools"}
    assert accepted[0]["rank"] == 64
    assert [answer["block_size"] for answer in accepted] == 4 * [128] + 4 * [None]
    assert [answer["device"] for answer in accepted] == 4 * ["cpu"] + 4 * ["cuda"]
    assert [answer["streams"] for answer in accepted] == 2 * [None, None, None, DECODE_STREAMS]
    roles = 2 * ["prefill", "prefill", "prefill", "decode"]
    for answer, role, root in zip(accepted, roles, 2 * ["..", "../..", "../..", ".."], strict=True):
        assert answer["connector"] == "NixlConnector"
        assert answer["module"] == GUARD_MODULE
        assert answer["policy"] == "fail"
        assert answer["extra"] == {
            "enforce_handshake_compat": True,
            "kv_lease_duration": LEASE_S,
            "qsun_bundle": root,
            "qsun_role": role,
        }
        assert answer["remote_code"] is False
        assert answer["log_requests"] is False


def test_the_parser_refuses_what_vllm_does_not_know(
    parsed: tuple[str, list[dict[str, Any]]],
) -> None:
    refused = parsed[1][-len(BROKEN) :]
    assert ["error" in answer for answer in refused] == [True] * len(BROKEN)


def test_the_image_is_of_the_vllm_that_was_asked(
    parsed: tuple[str, list[dict[str, Any]]],
) -> None:
    version = parsed[0].partition("+")[0].removesuffix(".cpu")
    assert f"vllm/vllm-openai:v{version}" == VLLM_IMAGE


def test_workers_and_their_tasks() -> None:
    spec = launch_spec(manifest(), "cpu")
    assert [(one.name, one.role, one.tasks, one.folder) for one in spec.workers] == [
        ("prefill", "prefill", ("math", "tools"), "base"),
        ("prefill-code-v2", "prefill", ("code.v2",), "prefill/code.v2"),
        ("prefill-sql", "prefill", ("SQL",), "prefill/SQL"),
        ("decode", "decode", ("math", "tools", "code.v2", "SQL"), "decode"),
    ]
    assert "Clients must never reach them" in spec.note


@pytest.mark.parametrize("folder", ["base", "models/base/full"])
def test_paths_lead_from_a_workers_folder_to_its_modules(folder: str) -> None:
    for worker in launch_spec(manifest(base_path=folder), "gpu").workers:
        paths = [one.partition("=")[2] for one in worker.arguments if "=../" in one]
        modules = [posixpath.normpath(posixpath.join(worker.folder, path)) for path in paths]
        expected = ["prefill/math", "prefill/tools"] if worker.folder == folder else []
        assert modules == expected
        tokenizer = posixpath.join(worker.folder, value(worker, "--tokenizer"))
        assert posixpath.normpath(tokenizer) == "tokenizer"


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_p_and_d_agree_in_all_that_shapes_the_cache(accelerator: Accelerator) -> None:
    workers = launch_spec(manifest(kv_cache_dtype="fp8"), accelerator).workers
    for argument, expected in (
        ("--max-model-len", "2048"),
        ("--dtype", "bfloat16"),
        ("--kv-cache-dtype", "fp8"),
        ("--seed", "0"),
    ):
        assert {value(worker, argument) for worker in workers} == {expected}
    transfers = [json.loads(value(worker, "--kv-transfer-config")) for worker in workers]
    for transfer, worker in zip(transfers, workers, strict=True):
        own = transfer["kv_connector_extra_config"]
        assert own.pop("qsun_role") == worker.role
        assert posixpath.normpath(posixpath.join(worker.folder, own.pop("qsun_bundle"))) == "."
    assert transfers == len(workers) * transfers[:1]


@pytest.mark.parametrize(
    ("ranks", "allowed"), [((1,), 1), ((8, 2), 8), ((9,), 16), ((16, 33), 64), ((300, 512), 512)]
)
def test_the_largest_rank_is_rounded_up(ranks: tuple[int, ...], allowed: int) -> None:
    modules = tuple(prefill_module(f"t{rank}", rank=rank) for rank in ranks)
    worker = launch_spec(manifest(prefill=modules), "cpu").workers[0]
    assert value(worker, "--max-lora-rank") == str(allowed)
    assert value(worker, "--max-loras") == str(len(ranks))


def test_environments() -> None:
    on_cpu, on_gpu = (launch_spec(manifest(), kind).workers for kind in ("cpu", "gpu"))
    for worker in (*on_cpu, *on_gpu):
        assert worker.environment["PYTHONSAFEPATH"] == "1"
        assert worker.environment["HF_HUB_OFFLINE"] == "1"
        assert worker.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    for workers in (on_cpu, on_gpu):
        ports = {worker.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] for worker in workers}
        assert len(ports) == len(workers)
    for worker in on_cpu:
        assert worker.environment["VLLM_CPU_INT4_W4A8"] == "0"
        assert worker.environment["UCX_TLS"] == "tcp,sm,self,cma"
    assert not [name for name in on_gpu[0].environment if name.startswith(("VLLM_CPU", "TORCH"))]


@pytest.mark.parametrize(("max_tokens", "gib"), [(2048, "1"), (8192, "2"), (131072, "17")])
def test_the_cpu_cache_holds_the_longest_request(max_tokens: int, gib: str) -> None:
    layout = KV_LAYOUT | {"layers": 32, "kv_heads": 8, "head_dim": 128}
    spec = launch_spec(manifest(kv_layout=layout, max_tokens=max_tokens), "cpu")
    assert {one.environment["VLLM_CPU_KVCACHE_SPACE"] for one in spec.workers} == {gib}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill": ()}, "it has no prefill module"),
        ({"boundary": "n"}, "boundary n: vLLM serves n-1 alone"),
        ({"base_path": None}, "need the base checkpoint, which it lacks"),
        ({"base_path": "../base"}, r"path \.\./base: not a plain relative path"),
        ({"decode_path": "/decode"}, "path /decode: not a plain relative path"),
        ({"prefill": (prefill_module("a", rank=513),)}, "LoRA rank 513: vLLM takes 1 to 512"),
        ({"prefill": (prefill_module("a", module="lora"),)}, "LoRA rank None"),
        ({"prefill": (prefill_module("a", module="ia3"),)}, "module ia3"),
        ({"prefill": (prefill_module("a", boundary="n"),)}, "tuned for boundary n;"),
        ({"prefill": (prefill_module("a=b"),)}, "task a=b: a name has"),
        ({"prefill": (prefill_module("decode"),)}, "task decode: that name is kept"),
        ({"prefill": (prefill_module("A.b"), prefill_module("a_b"))}, "task a_b: another task"),
    ],
)
def test_what_vllm_could_not_serve_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        launch_spec(manifest(**changes), "cpu")


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(IncompatibleError, match=r"boundary n:(.|\n)*base checkpoint"):
        launch_spec(manifest(boundary="n", base_path=None), "cpu")


@pytest.mark.parametrize("base_path", [None, "base"])
def test_without_lora_tasks_the_base_model_gets_no_worker(base_path: str | None) -> None:
    spec = launch_spec(manifest(prefill=(prefill_module("sql"),), base_path=base_path), "cpu")
    assert [worker.name for worker in spec.workers] == ["prefill-sql", "decode"]


def test_a_spec_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec, path = launch_spec(manifest(), "cpu"), tmp_path / "launch.json"
    path.write_text(json.dumps(spec.summary()))
    assert read_launch_spec(path) == spec
    assert spec.of("decode") == spec.workers[-1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"schema": 2}, "has schema 2"), ({"ports": []}, "ports"), ({"workers": [{}]}, "tasks")],
)
def test_a_spec_that_is_none_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "launch.json"
    path.write_text(json.dumps(launch_spec(manifest(), "cpu").summary() | changes))
    with pytest.raises(IncompatibleError, match=message):
        read_launch_spec(path)
    with pytest.raises(IncompatibleError, match="absent"):
        read_launch_spec(tmp_path / "absent")
