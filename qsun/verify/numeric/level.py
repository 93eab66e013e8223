"""The numeric level: what the modules compute on real prompts, in this process.

Every figure of a quantized decode module stands beside the same figure of round-to-nearest: what
AWQ leaves is judged by what plain rounding would have left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.checkpoint_files import read_config_file
from qsun.config import VerifyConfig
from qsun.decode_checkpoint import (
    DecodeCheckpoint,
    load_dequantized,
)
from qsun.handoff import Boundary
from qsun.models import load_model
from qsun.prefill_module import load_prefill
from qsun.progress import announce
from qsun.references import Reference, read_references
from qsun.rounding import round_layers
from qsun.scheme import Scheme, scheme_of
from qsun.verdict import Check, Outcome
from qsun.verify.numeric.cache_drift import LayerDrift, cache_drift
from qsun.verify.numeric.decode_module import (
    EXPORT_AGAIN,
    OTHER_WEIGHTS,
    codes_checks,
    tuned_through_checks,
)
from qsun.verify.numeric.hand_off_drift import Drift, hand_off_drift
from qsun.verify.numeric.length_drift import Curve, joined, length_drift
from qsun.verify.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Readers:
    """The base model, the decode module as a dense model, and, where D is quantized, its control.

    `rounded` is the base model rounded to the nearest code under D's own scheme.
    """

    base: PreTrainedModel
    decode: PreTrainedModel
    rounded: PreTrainedModel | None

    @property
    def others(self) -> list[PreTrainedModel]:
        """All but the base model."""
        return [self.decode] if self.rounded is None else [self.decode, self.rounded]


def numeric_checks(
    subject: Subject, base: Path, references: Mapping[str, Path], settings: VerifyConfig
) -> list[Check]:
    """Every numeric check; `references` names each task's file of prompts and responses."""
    config = read_config_file(subject.decode / "config.json")
    scheme, boundary = scheme_of(config), Boundary(subject.boundary)
    rows = {task: read_references(path, config["vocab_size"]) for task, path in references.items()}
    announce("numeric: loading the base model and the decode module")
    checks = [] if scheme is None else codes_checks(subject.decode)
    readers = _readers(subject.decode, base, config, scheme)
    checks += tuned_through_checks(subject, scheme)
    announce("numeric: K and V, layer by layer")
    every = [reference for of_task in rows.values() for reference in of_task]
    checks.append(_cache_check(cache_drift(readers.base, readers.others, every), settings))
    for task, of_task in rows.items():
        announce(f"numeric: {task} through the hand-off")
        prefill = load_prefill(subject.prefill[task], base, config["dtype"])
        checks += _task_checks(subject, task, prefill, readers, of_task, boundary, settings)
        del prefill
    return checks


def _readers(decode: Path, base: Path, config: Mapping[str, Any], scheme: Scheme | None) -> Readers:
    dtype = config["dtype"]
    full = load_model(base, dtype)
    if scheme is None:
        return Readers(full, load_model(decode, dtype), None)
    with DecodeCheckpoint(decode) as checkpoint:
        names = checkpoint.layer_names()
    rounded = load_model(base, dtype)
    round_layers(rounded, names, scheme)
    return Readers(full, load_dequantized(decode), rounded)


def _cache_check(drifts: Sequence[Sequence[LayerDrift]], settings: VerifyConfig) -> Check:
    """D's K and V against the base model's; the limit is a multiple of rounding's own error."""
    found = drifts[0]
    rounded = drifts[1] if len(drifts) > 1 else [None] * len(found)
    bad = []
    for index, (drift, control) in enumerate(zip(found, rounded, strict=True)):
        for part in ("keys", "values"):
            error = getattr(drift, f"{part}_error")
            limit = settings.max_cache_error
            if control is not None:
                limit = max(limit, settings.max_cache_error_ratio * _error(control, part))
            # Written so that NaN, which compares false with everything, fails.
            if not error <= limit:
                cosine = getattr(drift, f"{part}_cosine")
                bad.append(
                    f"layer {index} {part}: error {error:.3f}, cosine {cosine:.3f}, "
                    f"at most {limit:.3f}"
                )
    values = {
        "decode": [asdict(drift) for drift in found],
        "round_to_nearest": [asdict(drift) for drift in drifts[1]] if len(drifts) > 1 else None,
    }
    compared = "K and V that D writes with the base model's, by layer, on the tasks' prompts"
    if bad:
        message = f"they mean something else in {len(bad)} places: " + "; ".join(bad[:4])
        return Check("numeric.cache", Outcome.FAILED, compared, message, OTHER_WEIGHTS, values)
    worst = max(max(drift.keys_error, drift.values_error) for drift in found)
    message = f"largest relative error of a layer {worst:.3f}"
    if len(drifts) > 1:
        most = max(max(drift.keys_error, drift.values_error) for drift in drifts[1])
        message += f", round-to-nearest {most:.3f}"
    return Check("numeric.cache", Outcome.PASSED, compared, message, values=values)


def _error(drift: LayerDrift, part: str) -> float:
    return float(getattr(drift, f"{part}_error"))


def _task_checks(
    subject: Subject,
    task: str,
    prefill: PreTrainedModel,
    readers: Readers,
    references: Sequence[Reference],
    boundary: Boundary,
    settings: VerifyConfig,
) -> list[Check]:
    loss, drifts = hand_off_drift(prefill, readers.base, readers.others, references, boundary)
    alone, _ = hand_off_drift(readers.base, readers.base, [], references, boundary)
    checks = [
        _prefill_check(subject, task, loss, alone, settings),
        _hand_off_check(task, loss, drifts, settings),
    ]
    if settings.drift_tokens:
        texts = [joined(references, settings.drift_tokens)]
        curves = length_drift(prefill, readers.base, readers.others, texts, boundary)
        checks.append(_length_check(task, curves, settings))
    return checks


def _prefill_check(
    subject: Subject, task: str, loss: float, alone: float, settings: VerifyConfig
) -> Check:
    """P does for its task what it did when the bundle was made, and more than the base model."""
    name, compared = f"numeric.prefill.{task}", "loss of the task's references through P's cache"
    module = next((one for one in _modules(subject) if one.task == task), None)
    values = {"loss": loss, "base_loss": alone}
    problems = []
    # A stock module, the base model itself, has nothing to win.
    if module is not None and module.system is not None and not loss < alone:
        problems.append(f"{loss:.3f} nats a token, no better than {alone:.3f} by the base alone")
    if module is not None and module.reference_loss is not None:
        values["reference_loss"] = module.reference_loss
        room = settings.max_reference_difference * max(module.reference_loss, 0.1)
        if not abs(loss - module.reference_loss) <= room:
            problems.append(f"{loss:.3f} nats, {module.reference_loss:.3f} when it was exported")
    if problems:
        message = f"this module does not write {task}'s cache: " + "; ".join(problems)
        return Check(name, Outcome.FAILED, compared, message, EXPORT_AGAIN, values)
    message = f"{loss:.3f} nats a token; the base model alone {alone:.3f}"
    return Check(name, Outcome.PASSED, compared, message, values=values)


def _modules(subject: Subject) -> Sequence[Any]:
    return () if subject.manifest is None else subject.manifest.prefill


def _hand_off_check(
    task: str, base_loss: float, drifts: Sequence[Drift], settings: VerifyConfig
) -> Check:
    found, *controls = drifts
    compared = "D's predictions behind P's cache with the base model's behind the same"
    values: dict[str, Any] = {
        "base_loss": base_loss,
        "decode": asdict(found) | {"perplexity": found.perplexity},
        "round_to_nearest": None,
    }
    limit = settings.max_kl
    message = (
        f"KL {found.kl:.3f} nats a token, the same likeliest token at "
        f"{100 * found.top1_agreement:.1f} %, perplexity {found.perplexity:.3f}"
    )
    if controls:
        control = controls[0]
        limit = max(limit, settings.max_kl_ratio * control.kl)
        values["round_to_nearest"] = asdict(control) | {"perplexity": control.perplexity}
        message += (
            f"; round-to-nearest {control.kl:.3f}, {100 * control.top1_agreement:.1f} %, "
            f"{control.perplexity:.3f}"
        )
    name = f"numeric.hand_off.{task}"
    if not found.kl <= limit:
        message = f"{message}; at most {limit:.3f} nats is allowed"
        return Check(name, Outcome.FAILED, compared, message, OTHER_WEIGHTS, values)
    return Check(name, Outcome.PASSED, compared, message, values=values)


def _length_check(task: str, curves: Sequence[Curve], settings: VerifyConfig) -> Check:
    found, *controls = curves
    compared = "D's KL from the base model in the output's last quarter with that in its first"
    values: dict[str, Any] = {
        "decode": asdict(found) | {"growth": found.growth},
        "round_to_nearest": None,
    }
    message = f"over {found.edges[-1]} tokens the error grows {found.growth:.2f}-fold"
    if controls:
        values["round_to_nearest"] = asdict(controls[0]) | {"growth": controls[0].growth}
        message += f"; round-to-nearest's {controls[0].growth:.2f}-fold"
    name = f"numeric.length.{task}"
    if not found.growth <= settings.max_growth:
        message += f"; at most {settings.max_growth} is allowed"
        remedy = "Quantize with more bits or smaller groups: errors accumulate along the output."
        return Check(name, Outcome.FAILED, compared, message, remedy, values)
    return Check(name, Outcome.PASSED, compared, message, values=values)
