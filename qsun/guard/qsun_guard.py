"""The guard: a vLLM plug-in that keeps a decode worker from ever reading a prompt by itself.

It is vLLM's own NIXL connector with three refusals added, named by `kv_connector_module_path`. It
runs in the serving environment, which has no qsun: it imports nothing of it.

At the start it refuses a worker whose files are not those of the bundle around them, or whose
settings could make a decode module read prompts. A prefill worker then seals what it hands over:
the engine's id, which a stock connector compares, gets the bundle's digest and the task before it,
so that only a guarded decode worker of the same bundle can fetch it. A decode worker refuses every
request, also one that was preempted, without a seal of its own bundle and the whole prompt's cache,
and every cache that took longer to fetch than it was promised for. A refused request ends as
vLLM's own failed transfers do: with an error, before its first token.

Written for vLLM 0.32, whose connectors name the requests that failed, and for 0.26, whose name the
blocks that were to be filled: a decode worker shares none, so they fail one request alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector as Stock
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

SEAL, SEPARATOR = "qsun", "|"
SEAL_DIGITS = 16
HASHING_THREADS = 8
MARGIN_S = 1.0  # a clock's error between two machines, and the time between a look and its use
RELEASE = "qsun_release"


class GuardError(RuntimeError):
    """A worker that must not serve."""


class NixlConnector(Stock):
    """The name is vLLM's own, which parts of it look for."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        if role == KVConnectorRole.SCHEDULER:
            extra = transfer.kv_connector_extra_config
            self._bundle = BundleFiles(Path(extra["qsun_bundle"]))
            self._reads_prompts = extra["qsun_role"] == "prefill"
            check_settings(vllm_config, self._reads_prompts)
            self._bundle.check_folder(Path.cwd())
            self._own_task = str(vllm_config.model_config.served_model_name)
            self._lease_s = float(transfer.get_from_extra_config("kv_lease_duration", 30))
        self._doomed: set[str] = set()
        self._refused: dict[str, list[int]] = {}
        self._deadlines: dict[str, tuple[str, float]] = {}
        self._awaited: dict[str, list[int]] = {}
        self._lost_blocks: set[int] = set()
        self._fetched: dict[str, float] = {}
        super().__init__(vllm_config, role, kv_cache_config)

    # In the scheduler.

    def on_new_request(self, request: Any) -> None:
        """Take the seal off before vLLM looks for the engine that it names."""
        params = request.kv_transfer_params
        if params and not self._reads_prompts and not self._unseal(params):
            request.kv_transfer_params = None
        super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """As vLLM's. A refused request waits for one token that will fail to come."""
        problem = None if self._reads_prompts else self._problem(request, num_computed_tokens)
        if problem is None:
            return super().get_num_new_matched_tokens(request, num_computed_tokens)
        logger.error("qsun refuses %s: %s", request.request_id, problem)
        self._doomed.add(request.request_id)
        return 1, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """As vLLM's; nothing is fetched for a refused request."""
        if request.request_id in self._doomed:
            # Not before: only what has a block to wait for may fail to come.
            self._refused[request.request_id] = [
                block for group in blocks.get_block_ids() for block in group
            ]
            return
        if not self._reads_prompts:
            self._note_fetched(request.kv_transfer_params["remote_request_id"])
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Tell the worker's side what was refused."""
        meta = super().build_connector_meta(scheduler_output)
        meta.qsun_refused, self._refused = self._refused, {}
        return meta

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As vLLM's. A refused request's cache is freed where it lies; a prefill is sealed."""
        self._doomed.discard(request.request_id)
        promised_until = time.perf_counter() + self._lease_s
        delayed, params = super().request_finished_all_groups(request, block_ids)
        task = self._task_of(request) if params is not None and self._reads_prompts else None
        if params is not None and task is not None:
            params["remote_engine_id"] = seal(self._bundle.digest, task, params["remote_engine_id"])
            params["remote_blocks_expiry_time"] = promised_until
        return delayed, params

    def _note_fetched(self, cache: str) -> None:
        """Remember a cache for as long as it could be asked for again: it is free once read."""
        now = time.monotonic()
        self._fetched = {one: until for one, until in self._fetched.items() if until > now}
        self._fetched[cache] = now + 2 * self._lease_s

    def _unseal(self, params: dict[str, Any]) -> bool:
        """Whether a guarded prefill worker of this bundle sealed it; if so, as vLLM knows it."""
        parts = str(params.get("remote_engine_id")).split(SEPARATOR, 3)
        if len(parts) != 4 or parts[:2] != [SEAL, self._bundle.digest[:SEAL_DIGITS]]:
            logger.error("qsun: a cache that no prefill worker of this bundle sealed")
            return False
        params["remote_engine_id"] = parts[3]
        return True

    def _problem(self, request: Any, computed: int) -> str | None:
        """Why the decode module would have to read the prompt; None where it need not."""
        params = request.kv_transfer_params or {}
        prompt = len(request.prompt_token_ids or ())
        if request.num_preemptions:
            return "it was preempted, and its cache is gone"
        if computed:
            return f"{computed} tokens come from this worker's own cache"
        if not params.get("do_remote_prefill") or not params.get("remote_block_ids"):
            return "no prefill module wrote its prompt's cache"
        if params.get(RELEASE):
            return "it only gives its cache back"
        if params.get("remote_request_id") in self._fetched:
            return "its cache was fetched before"
        if prompt < 2 or params.get("remote_num_tokens") != prompt:
            return f"the cache has {params.get('remote_num_tokens')} of {prompt} prompt tokens"
        if params.get("remote_blocks_expiry_time") is None:
            return "it does not say how long its cache is kept"
        return None

    def _task_of(self, request: Any) -> str | None:
        """What the request's prompt was read as; None for an adapter that is not the bundle's."""
        adapter = request.lora_request
        if adapter is None:
            return self._own_task
        try:
            self._bundle.check_adapter(adapter.lora_name, Path(adapter.lora_path))
        except GuardError as error:
            logger.error("qsun seals nothing: %s", error)
            return None
        return str(adapter.lora_name)

    # In the worker.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """As vLLM's; keeps until when each cache was promised."""
        meta = self._connector_metadata
        self._refused |= getattr(meta, "qsun_refused", {})
        for request_id, wanted in meta.reqs_to_recv.items():
            if getattr(wanted, "awaiting_kvs", True):
                until = wanted.remote.blocks_expiry_time
                self._deadlines[request_id] = wanted.remote.engine_id, until
                self._awaited[request_id] = [
                    block for group in wanted.local_block_ids for block in group
                ]
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """As vLLM's; what was refused or came too late has failed."""
        results = super().get_transfer_results(finished_req_ids)
        failed = set(self._failed(results.finished_recving))
        results.failed_recving |= failed
        results.finished_recving |= failed
        return results

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """The same where vLLM knows no `get_transfer_results`."""
        sent, received = super().get_finished(finished_req_ids)
        failed = self._failed(received)
        self._lost_blocks.update(block for blocks in failed.values() for block in blocks)
        return sent, received | set(failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """As vLLM's, and what `get_finished` found to have failed."""
        lost, self._lost_blocks = self._lost_blocks, set()
        return set(super().get_block_ids_with_load_errors()) | lost

    def _failed(self, received: set[str]) -> dict[str, list[int]]:
        """The refused and the late, each with the blocks that hold no cache of its prompt."""
        blocks = {one: self._awaited.pop(one, []) for one in received}
        late = {one: blocks[one] for one in received if self._is_late(one)}
        if late:
            logger.error("qsun: caches that came after their lease: %s", ", ".join(sorted(late)))
        refused, self._refused = self._refused, {}
        return late | refused

    def _is_late(self, request_id: str) -> bool:
        if request_id not in self._deadlines:
            return False
        engine, until = self._deadlines.pop(request_id)
        offset = self.connector_worker._engine_clock_offset.get(engine)
        return offset is None or time.perf_counter() + MARGIN_S >= until - offset


def seal(bundle: str, task: str, engine: str) -> str:
    """The engine's id as a guarded prefill worker gives it."""
    return SEPARATOR.join((SEAL, bundle[:SEAL_DIGITS], task, engine))


def check_settings(config: Any, reads_prompts: bool) -> None:
    """Refuse settings under which a decode module reads prompts or is another one.

    Raises:
        GuardError: names every one.
    """
    transfer, problems = config.kv_transfer_config, []
    if transfer.kv_load_failure_policy != "fail":
        problems.append(f"kv_load_failure_policy {transfer.kv_load_failure_policy}, not fail")
    if not transfer.get_from_extra_config("enforce_handshake_compat", True):
        problems.append("enforce_handshake_compat is off")
    if not reads_prompts and config.cache_config.enable_prefix_caching:
        problems.append("prefix caching is on: its own answers would become prompts")
    if os.environ.get("VLLM_CPU_INT4_W4A8", "0") != "0":
        problems.append("VLLM_CPU_INT4_W4A8 rounds activations to 8 bits")
    if config.model_config.model != "./":
        problems.append(f"--model {config.model_config.model}, not ./")
    if problems:
        raise GuardError(f"qsun refuses to start: {'; '.join(problems)}")


class BundleFiles:
    """What a bundle's manifest says of its files, compared with what lies there."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        manifest = json.loads((self._root / "bundle.json").read_text(encoding="utf-8"))
        self.digest = manifest.pop("manifest_sha256")
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != self.digest:
            raise GuardError(f"{self._root}/bundle.json was changed after it was written")
        self._files: dict[str, str] = manifest["files"]
        self._adapters = {one["task"]: one["path"] for one in manifest["prefill"]}
        self._checked: set[tuple[str, Path]] = set()

    def check_folder(self, folder: Path) -> None:
        """Refuse a folder whose files are not the bundle's.

        Raises:
            GuardError: names those that differ.
        """
        name = folder.resolve().relative_to(self._root).as_posix()
        listed = sorted(path for path in self._files if path.startswith(f"{name}/"))
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            alike = dict(zip(listed, pool.map(self._is_as_listed, listed), strict=True))
        different = [path for path in listed if not alike[path]]
        if different or not listed:
            raise GuardError(f"not the bundle's files: {', '.join(different) or folder}")

    def check_adapter(self, task: str, folder: Path) -> None:
        """Refuse an adapter that is not the bundle's for `task`; each is read once.

        Raises:
            GuardError: it is another.
        """
        place = folder.resolve()
        if (task, place) in self._checked:
            return
        if place != (self._root / self._adapters.get(task, "?")).resolve():
            raise GuardError(f"the adapter {folder} is not the bundle's for {task}")
        self.check_folder(place)
        self._checked.add((task, place))

    def _is_as_listed(self, path: str) -> bool:
        place = self._root / path
        if not place.is_file():
            return False
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._files[path]
