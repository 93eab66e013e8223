"""Records and bundles for reports: small, of the shapes that qsun's commands write."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from qsun.bundle import Manifest, write_manifest
from qsun.files import digest_folder
from qsun.records import Record
from tests.manifests import manifest, prefill_module

HARDWARE = {"machine": "x86_64", "accelerator": "Some GPU", "cores": 2, "memory_gib": 23.5}
VERSIONS = {"python": "3.11.7", "qsun": "0.1.0"}
CREATED = "2026-11-28T20:25:24+00:00"
OTHER_BUNDLE = "ab" * 32


def put(
    path: Path,
    kind: str,
    result: dict[str, Any],
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a record, whatever is in it."""
    values: dict[str, Any] = {
        "command": f"qsun {kind} of this test",
        "created": CREATED,
        "versions": VERSIONS,
        "hardware": HARDWARE,
    }
    Record(kind, config or {}, 7, result, **values | changes).write(path)
    return path


def put_bundle(folder: Path, tasks: Sequence[str] = ("math", "code")) -> str:
    """A bundle's manifest and its quantization's record; gives the manifest's digest."""
    put(folder / "records/quantization.json", "quantization", quantization(), {"name": "small"})
    put(folder / "records/tuning-math.json", "tuning", {})
    (folder / "decode").mkdir()
    (folder / "decode/model.safetensors").write_bytes(b"weights")
    modules = tuple(prefill_module(task, rank=8) for task in tasks)
    made: Manifest = manifest(prefill=modules, files=digest_folder(folder))
    return write_manifest(folder, made)


def check(name: str, outcome: str = "passed", message: str = "it agrees") -> dict[str, Any]:
    remedy = "tune it again" if outcome == "failed" else ""
    return {
        **{"name": name, "outcome": outcome, "compared": "two things", "message": message},
        **{"remedy": remedy, "values": None},
    }


def verdict(bundle: str | None = None, *more: dict[str, Any]) -> dict[str, Any]:
    checks = [check("static.files"), check("numeric.cache", message="error 0.219"), *more]
    bad = {one["outcome"] for one in checks} - {"passed"}
    return {
        "bundle": bundle,
        "compatible": False if "failed" in bad else None if bad else True,
        "checks": checks,
        "seconds": {"static": 0.23, "numeric": 53.13},
    }


def score(accuracy: float, low: float, high: float) -> dict[str, Any]:
    return {
        **{"metric": "accuracy", "accuracy": accuracy, "total": 40, "correct": 0},
        **{"interval_95": [low, high], "mean_tokens": 6.0, "invalid": 0.0, "unfinished": 0.0},
    }


def scorecard(bundle: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "tests": {"math.seen": {"sha256": "cd" * 32}},
        "systems": {
            "math.seen": {"base": score(0.025, 0.004, 0.129), "qsun": score(0.6249, 0.47, 0.76)}
        },
        "pairs": [
            {
                **{"first": "qsun", "second": "base", "test": "math.seen", "difference": 0.6},
                **{"interval_95": [0.45, 0.74], "p": 0.00012},
            }
        ],
        **{"bundle": bundle, "limit": None, "served": False, "warnings": [], "tpot": None},
        **changes,
    }


def quantization() -> dict[str, Any]:
    layers = [
        {
            "name": f"model.layers.{block}.{kind}",
            **{"bits": 4 if block else 3, "stored_bits": 4, "group_size": 64},
            **{"error": 0.01 * (block + 1), "rtn_error": 0.03 * (block + 1)},
        }
        for block in range(6)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]
    perplexity = {"full_precision": 11.0787, "round_to_nearest": 12.7364, "quantized": 11.7274}
    return {
        "quantization": {"layers": layers, "perplexity": perplexity, "size_ratio": 0.2695},
        "base": {"model": "org/base", "sha256": {}},
    }


def tpot(name: str, batch: int, milliseconds: float) -> dict[str, Any]:
    return {
        **{"format": name, "batch": batch, "context_tokens": 512},
        "tpot_s": milliseconds / 1000,
    }


def latency(bundle: str | None = None) -> dict[str, Any]:
    return {
        **{"bundle": bundle, "decode": "W4A16 asymmetric, group 64", "served": {}},
        "tpot": [
            *(tpot("bfloat16", batch, 10 + batch) for batch in (1, 2, 4)),
            *(tpot("W4A16", batch, 5 + batch) for batch in (1, 2, 4)),
        ],
        "floor": [tpot("W4A16", batch, 2.5) for batch in (1, 2, 4)],
        "prefill": [{"prompt_tokens": 256, "seconds": 0.0321}],
        "hand_off_s": 0.0042,
    }


def kernel_times() -> dict[str, Any]:
    def sweep(name: str, backend: str, kernels: list[str], ms: float) -> dict[str, Any]:
        rows = [
            {
                **{"batch": batch, "context_tokens": context, "tpot_s": (ms + batch) / 1000},
                **({"floor_s": ms / 4000} if backend == "auto" else {}),
            }
            for context in (512, 2048)
            for batch in (1, 8)
        ]
        label = name if backend == "auto" else f"{name}, {backend}"
        told = {"shape": "large", "name": name, "label": label, "backend": backend}
        return told | {"kernels": kernels, "tpot": rows}

    return {
        "sweeps": [
            sweep("bfloat16", "auto", [], 5),
            sweep("W4A16 asymmetric", "auto", ["Machete"], 4),
            sweep("W4A16 asymmetric", "marlin", ["Marlin"], 3),
            sweep("FP8 W8A8", "auto", ["Cutlass"], 3.5),
        ]
    }


def point(rate: float | None, alpha: float | None, tokens: float, **load: Any) -> dict[str, Any]:
    metrics = {
        **{"tokens_per_s": tokens, "tokens_per_s_per_decode_worker": tokens / 2},
        **{"tokens_per_s_per_worker": tokens / 4, "goodput_per_s": 1.5, "ttft_p50_s": 0.111},
        **{"ttft_p99_s": 0.222, "tpot_p50_s": 0.0333, "tpot_p99_s": 0.0444, "fairness": 0.97},
        "interactivity_p50_tokens_per_s": 30.0,
    }
    return {
        "load": {
            **{"rate_per_s": rate, "concurrency": None, "arrivals": "poisson", "alpha": alpha},
            **{"prompt_tokens": "fixed:256", "output_tokens": "fixed:64", "trace": None, "seed": 0},
            **load,
        },
        "runs": [
            {"sent": 20, "answered": 20, "failed": 0, "failures": {}},
            {"sent": 21, "answered": 20, "failed": 1, "failures": {"time-out": 1}},
        ],
        "summary": {
            name: {"mean": value, "interval": [0.9 * value, 1.1 * value]}
            for name, value in metrics.items()
        },
    }


def bench(
    system: str | None, points: Sequence[dict[str, Any]] = (), **changes: Any
) -> dict[str, Any]:
    pace = {"sun": 60, "qsun": 75}.get(str(system), 50)
    every = [point(rate, alpha, pace * rate) for rate in (1.0, 2.0) for alpha in (0.0, 1.0)]
    return {
        **{"bundle": None, "system": system, "policy": "shared", "decode": "bfloat16"},
        "workers": {"prefill": 2, "decode": 2},
        "tasks": ["math", "code"],
        "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
        **{"complete": True, "missing": [], "points": list(points) or every},
        **changes,
    }


def fleet() -> dict[str, Any]:
    return {
        "fleet": [
            {
                **{"system": system, "tasks": tasks, "rate_per_s": 4.0, "alpha": 1.0},
                **{"decode_workers": workers, "prefill_workers": 2, "tpot_p50_s": 0.031},
                **{"tpot_p99_s": 0.048, "ttft_p99_s": 0.9},
            }
            for system, per_task in (("isolated", 1), ("qsun", 0))
            for tasks in (4, 8)
            for workers in [tasks * per_task or tasks // 4]
        ]
    }


def every_record(folder: Path, bundle: str | None = None) -> list[Path]:
    """A record of each kind, quantization left to the bundle."""
    return [
        put(folder / "verdict.json", "verdict", verdict(bundle)),
        put(folder / "scorecard.json", "scorecard", scorecard(bundle)),
        put(folder / "latency.json", "latency", latency(bundle)),
        put(folder / "isolated.json", "bench", bench("isolated")),
        put(folder / "qsun.json", "bench", bench("qsun")),
        put(folder / "fleet.json", "simulation", fleet()),
    ]


class Tables(HTMLParser):
    """A page's tables as rows of cells, by caption, and all its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[str] = []
        self.text: list[str] = []
        self._rows: list[list[str]] = []
        self._open = self._caption = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        if tag in ("caption", "th", "td"):
            self._open = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("caption", "th", "td"):
            self._open = ""
        elif tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open == "caption":
            self._caption += data
        elif self._open:
            self._rows[-1][-1] += data
