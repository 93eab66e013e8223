"""The guard with a fault: caches that a decode worker is to fetch get lost on the way.

What QSUN_FAULT_FILE says decides, for as long as it says so: `fail` reports every fetch as failed,
`lose` does not begin any, so that none is ever reported. vLLM loads this in place of the guard.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

_spec = importlib.util.spec_from_file_location("real_guard", os.environ["QSUN_REAL_GUARD"])
assert _spec is not None
assert _spec.loader is not None
_real = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_real)


def fault() -> str:
    path = Path(os.environ["QSUN_FAULT_FILE"])
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


class NixlConnector(_real.NixlConnector):  # type: ignore[name-defined, misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._kept: dict[str, Any] = {}
        super().__init__(*arguments, **named)

    def start_load_kv(self, forward_context: Any, **named: Any) -> None:
        meta = self._connector_metadata
        if fault() == "lose":
            self._kept |= meta.reqs_to_recv
            meta.reqs_to_recv = {}
        elif self._kept:
            # Found again, long after: vLLM waits for each to be reported, whatever became of it.
            meta.reqs_to_recv |= self._kept
            self._kept = {}
        super().start_load_kv(forward_context, **named)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        if fault() == "fail":
            results.failed_recving |= results.finished_recving
        return results
