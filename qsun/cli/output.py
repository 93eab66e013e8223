"""Output: plans and results as text a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.files import size
from qsun.records import REPORT

if TYPE_CHECKING:
    from qsun.doctor import Finding
    from qsun.inspection import Inspection
    from qsun.jobs.prepare import Prepared
    from qsun.verdict import Verdict

WORST_LAYERS = 6


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan_text(prepared: Prepared) -> str:
    """The plan and its estimate, a line per kind of layer."""
    plan, expected = prepared.plan, prepared.estimate
    kind = "symmetric" if plan.symmetric else "asymmetric"
    stored = "" if plan.stored_bits is None else f", stored in {plan.stored_bits} bits"
    bits = str(plan.bits) if plan.target_bits is None else f"at most {plan.bits}"
    kinds: dict[tuple[str, int, int], int] = {}
    for layer in plan.layers:
        key = (layer.name.rpartition(".")[2], layer.in_features, layer.out_features)
        kinds[key] = kinds.get(key, 0) + 1
    rows = [
        [name, str(count), f"{inputs} -> {outputs}", bits, str(plan.group_size)]
        for (name, inputs, outputs), count in kinds.items()
    ]
    return "\n".join(
        [
            f"{prepared.run.name}: {plan.architecture}, W{plan.code_bits:g}A16 {kind}, "
            f"group {plan.group_size}{stored}, {plan.format}",
            table(["layer", "count", "shape", "bits", "group"], rows),
            f"kept in full precision: embeddings, norms, {', '.join(plan.full_precision_layers)}",
            f"calibration: {prepared.calibration.samples} samples of at most "
            f"{prepared.calibration.max_tokens} tokens",
            f"estimated: checkpoint {size(expected.checkpoint_bytes)}, "
            f"disk {size(expected.disk_bytes)}, memory {size(expected.memory_bytes)}, "
            f"search {duration(expected.search_s)}",
        ]
    )


def quantization_text(out: Path, question: str, result: dict[str, Any]) -> str:
    """What a finished run made: worst layers, size, perplexity, load check, cost."""
    quantization = result["quantization"]
    worst = sorted(quantization["layers"], key=lambda layer: -layer["error"])[:WORST_LAYERS]
    rows = [
        [
            layer["name"],
            f"{100 * layer['rtn_error']:.2f} %",
            f"{100 * layer['error']:.2f} %",
        ]
        for layer in worst
    ]
    others = len(quantization["layers"]) - len(worst)
    cost = result["cost"]
    facts = [
        ["decode module", str(out)],
        [
            "quantized layers",
            f"{size(quantization['layer_bytes'])}, {quantization['size_ratio']:.3f} of 16-bit",
        ],
        [
            "checkpoint",
            f"{size(quantization['checkpoint_bytes'])} from {size(quantization['base_bytes'])}",
        ],
        ["perplexity", _perplexity(quantization["perplexity"])],
        *_load_check_facts(result["load_check"], question),
        [
            "cost",
            f"{duration(cost['wall_s'])} in all, search {duration(cost['search_s'])} "
            f"(estimated {duration(cost['search_s_estimated'])}), peak memory "
            f"{size(cost['peak_memory_bytes'])} "
            f"(estimated {size(cost['peak_memory_bytes_estimated'])})",
        ],
    ]
    return "\n".join(
        [
            "Relative output error of the worst layers:",
            table(["layer", "round-to-nearest", "quantized"], rows),
            f"... and {others} better ones; reasons, coverage and all layers: {REPORT}",
            "",
            *(f"{name + ':':18}{value}" for name, value in facts),
        ]
    )


def _perplexity(values: dict[str, float]) -> str:
    full = values["full_precision"]
    return ", ".join(
        [f"full precision {full:.3f}"]
        + [
            f"{label} {values[key]:.3f} ({100 * (values[key] / full - 1):+.1f} %)"
            for label, key in (("quantized", "quantized"), ("round-to-nearest", "round_to_nearest"))
        ]
    )


def _load_check_facts(check: dict[str, Any], question: str) -> list[list[str]]:
    if check["mode"] == "skip":
        return [["load check", "not run (load_check.mode is skip)"]]
    quantized = check["quantized"]
    noise = check.get("full_precision")
    beside = f"; full precision {noise['mean_difference']:.3f}" if noise else ""
    return [
        [
            "load check",
            f"passed: vLLM differs from transformers by {quantized['mean_difference']:.3f} nats "
            f"a token over {quantized['prompts']} prompts{beside}",
        ],
        ["greedy text", _greedy(quantized["greedy_texts"], quantized["greedy_gaps"])],
        ["asked vLLM", question],
        ["it answered", " ".join(quantized["answer"].split())],
    ]


def _greedy(texts: int, gaps: Sequence[float]) -> str:
    if not gaps:
        return f"all {texts} continuations equal"
    return (
        f"{texts - len(gaps)} of {texts} continuations equal; the others part where the reference "
        f"is at most {max(gaps):.3f} nats apart"
    )


def inspection_text(found: Inspection) -> str:
    """What `qsun inspect` prints."""
    kv = found.kv
    window = f", window {kv.sliding_window}" if kv.sliding_window else ""
    factor = f", factor {kv.rope_factor:g}" if kv.rope_factor is not None else ""
    facts = [
        ["architecture", f"{found.architecture}, {found.dtype}"],
        ["embeddings", "tied with the head" if found.tied_embeddings else "not tied"],
        [
            "KV layout",
            f"{kv.layers} layers x {kv.kv_heads} heads x {kv.head_dim}, "
            f"{kv.bytes_per_token} bytes a token",
        ],
        [
            "rotary",
            f"{kv.rope_type}, theta {kv.rope_theta:g}{factor}{window}, {kv.max_tokens} tokens",
        ],
        ["vocabulary", str(kv.vocabulary)],
        ["quantization", str(found.scheme or "none")],
    ]
    if found.scheme:
        facts.append(
            [
                "quantized layers",
                f"{found.quantized_layers}, {size(found.quantized_layer_bytes)}",
            ]
        )
    if found.weight_bytes:
        facts.append(["weight files", size(found.weight_bytes)])
    if found.record:
        state = f"{len(found.files_changed)} files changed" if found.files_changed else "all files"
        facts.append(
            ["record", f"{found.record}, {state}{'' if found.files_changed else ' match'}"]
        )
    return "\n".join(f"{name + ':':18}{value}" for name, value in facts)


def findings_text(findings: Sequence[Finding]) -> str:
    """What `qsun doctor` prints: one line a finding, and beneath it what mends it."""
    marks = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.level]}  {finding.about}: {finding.text}")
        if finding.remedy:
            lines.append(f"{'':9}-> {finding.remedy}")
    return "\n".join(lines)


def tuning_text(out: Path, result: dict[str, Any]) -> str:
    """What `qsun tune` prints: a line per system and test set."""
    losses, tests = result["validation_loss"], result["tests"]
    sets = list(next(iter(tests.values()), {}))
    rows = [
        [name, f"{loss:.4f}", *(_accuracy(tests.get(name, {}).get(test)) for test in sets)]
        for name, loss in losses.items()
    ]
    training, task = result["training"], result["task"]
    overlap = ", ".join(
        f"{name} {found['shared']} of {found['tests']}"
        for name, found in task["overlap_with_training"].items()
    )
    facts = [
        f"{task['name']}, system {result['system']}, {result['module']} module, boundary "
        f"{result['boundary']}: {out}",
        table(["", "validation loss", *sets], rows),
        f"{training['steps']} steps, {training['tokens']} tokens, {training['seconds']:.0f} s",
    ]
    if overlap:
        facts.append(f"tests that share a word sequence with training: {overlap}")
    return "\n".join(facts)


def _accuracy(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["interval_95"]
    return f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def bundle_text(out: Path, manifest: Mapping[str, Any]) -> str:
    """What a bundle holds, a line per task."""
    rows = [
        [
            module["task"],
            module["module"] if module["rank"] is None else f"{module['module']} {module['rank']}",
            module["system"] or "?",
            f"{module['reference_loss']:.3f}",
            f"{module['base_loss']:.3f}",
        ]
        for module in manifest["prefill"]
    ]
    return "\n".join(
        [
            f"{out}: {manifest['decode_scheme']}, boundary {manifest['boundary']}",
            table(["task", "module", "system", "loss", "base model's"], rows),
            "loss: nats a token of held-back responses, through the full-precision decoder",
            f"prove it: qsun verify {out}",
        ]
    )


def verdict_text(verdict: Verdict, path: Path | None) -> str:
    """Every check that did not pass in full, the others in a line each, and the verdict last."""
    lines = []
    for check in verdict.checks:
        lines.append(f"{check.outcome.value:9}  {check.name}: {check.message}")
        if check.outcome.value in ("failed", "unchecked"):
            lines.append(f"{'':11}compared: {check.compared}")
            lines += [f"{'':11}to do: {check.remedy}"] if check.remedy else []
    words = {True: "COMPATIBLE", False: "INCOMPATIBLE", None: "NOT FULLY CHECKED"}
    where = "" if path is None else f", written to {path}"
    return "\n".join([*lines, f"{words[verdict.compatible]}{where}"])
