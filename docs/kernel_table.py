"""The README's table of the kernel that a GPU's decode worker takes, from what qsun chooses by."""

from __future__ import annotations

import json

from qsun.kernel_advice import DEFAULT, TIMES, BatchAdvice, KernelAdvice, KernelTime, choose

FORMAT = "W4A16 asymmetric"


def table() -> str:
    """Batches across; what vLLM would take, what qsun has it take, and what that gains."""
    measured = json.loads(TIMES.read_text(encoding="utf-8"))
    shape = measured["shapes"][0]
    times = [
        KernelTime(one["format"], one["backend"], {int(b): s for b, s in one["tpot_s"].items()})
        for one in shape["times"]
    ]
    advice = choose(times, FORMAT, 1, measured)
    assert advice is not None
    (default,) = (
        one["kernels"][0].removesuffix("LinearKernel")
        for one in shape["times"]
        if (one["format"], one["backend"]) == (FORMAT, DEFAULT)
    )
    rows = [
        ("bfloat16 (SUN)", [f"{1000 * one.full_precision_tpot_s:.2f}" for one in advice.by_batch]),
        (
            f"{FORMAT}, vLLM's choice ({default})",
            [f"{1000 * one.default_tpot_s:.2f}" for one in advice.by_batch],
        ),
        (f"**{FORMAT}, qsun's choice**", [_chosen(one) for one in advice.by_batch]),
        ("bfloat16's, of qsun's", [_gain(one) for one in advice.by_batch]),
    ]
    header = f"| {shape['shape']}, TPOT in ms by decode batch | {_joined(advice)} |"
    lines = [header, f"|---|{'---|' * len(advice.by_batch)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join([*lines, "", _legend(measured)])


def _joined(advice: KernelAdvice) -> str:
    return " | ".join(str(one.batch) for one in advice.by_batch)


def _chosen(one: BatchAdvice) -> str:
    return f"{1000 * one.tpot_s:.2f} ({'default' if one.backend == DEFAULT else one.backend})"


def _gain(one: BatchAdvice) -> str:
    return f"{one.full_precision_tpot_s / one.tpot_s:.2f}x"


def _legend(measured: dict[str, object]) -> str:
    return (
        f"vLLM {measured['vllm']}'s engine alone on one {measured['accelerator']}, "
        f"{measured['weights']} as weights, contexts of {measured['context_tokens']} tokens; more "
        "formats, batches and contexts in [`docs/kernels.md`](docs/kernels.md).\n"
    )
