"""Tuning records: what a prefill module's own record says of its base, boundary and system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.bundle import Manifest, PrefillModule
from qsun.errors import IncompatibleError, ModelError, QsunError, UncheckedError
from qsun.records import read_record
from qsun.verify.steps import enumerated
from qsun.verify.subject import TUNING_RECORD

QUANTIZATION_RECORD = Path("records") / "quantization.json"
WEIGHTS_SUFFIX = ".safetensors"
TUNED_FOR_THE_HANDOFF = ("sun", "qsun")
NO_RECORD = f"the module has no {TUNING_RECORD}: only the numeric level can tell"
SHORT = 12  # of a digest's 64 characters, in messages


def tuning_result(folder: Path) -> dict[str, Any]:
    """The result of a prefill module's tuning record.

    Raises:
        UncheckedError: it has none.
        ModelError: one that cannot be read.
    """
    path = folder / TUNING_RECORD
    if not path.is_file():
        raise UncheckedError(NO_RECORD)
    try:
        result = read_record(path, "tuning").result
    except QsunError as error:
        raise ModelError(str(error)) from error
    if not isinstance(result, dict):
        raise ModelError(f"{path} has no result")
    return result


def _readable_result(folder: Path) -> dict[str, Any]:
    """The same for the checks that follow: what cannot be read, another check's failure says."""
    try:
        return tuning_result(folder)
    except ModelError as error:
        raise UncheckedError(str(error)) from error


def require_record(folder: Path, path: str, module: PrefillModule, files: Mapping[str, str]) -> str:
    """Whether the record is that of this module: its weights have the digests recorded.

    Raises:
        IncompatibleError: another module's, by its weights or by its kind.
        UncheckedError: no record, or one that names none of the module's weights.
    """
    result = tuning_result(folder)
    if result.get("module") != module.module:
        raise IncompatibleError(
            f"the record is of a {result.get('module')} module, the manifest says {module.module}"
        )
    recorded = result.get("files") or {}
    found = {
        name: digest
        for full, digest in files.items()
        if (name := full.removeprefix(f"{path}/")) != full and name.endswith(WEIGHTS_SUFFIX)
    }
    return _same_digests(found, recorded, "these weights", "the record's", "weights")


def known_base(manifest: Manifest) -> dict[str, str]:
    """SHA-256 by name of every file that holds the base model's weights, origin or copy."""
    origin: dict[str, str] = manifest.base.get("sha256") or {}
    return _base_copy(manifest) | origin


def _base_copy(manifest: Manifest) -> dict[str, str]:
    if manifest.base_path is None:
        return {}
    prefix = f"{manifest.base_path}/"
    return {
        name.removeprefix(prefix): digest
        for name, digest in manifest.files.items()
        if name.startswith(prefix) and name.endswith(WEIGHTS_SUFFIX)
    }


def compare_base_copy(manifest: Manifest) -> str:
    """Whether the bundle's base checkpoint is the base model that the manifest names.

    Raises:
        IncompatibleError: a file of the same name has another digest.
    """
    origin: dict[str, str] = manifest.base.get("sha256") or {}
    copy = _base_copy(manifest)
    if not origin.keys() & copy.keys():
        return f"converted from {', '.join(origin) or 'an origin without digests'}"
    return _same_digests(copy, origin, "the bundle's", "the manifest's base", "base weights")


def base_of_decode(decode: Path) -> dict[str, str]:
    """The base model's digests in a decode module's own record; for a pair, which has no manifest.

    Raises:
        UncheckedError: it has no record.
        QsunError: one that cannot be read.
    """
    if (decode / QUANTIZATION_RECORD).is_file():
        record = read_record(decode / QUANTIZATION_RECORD, "quantization")
        return dict(record.result["base"]["sha256"])
    raise UncheckedError(f"the decode module has no {QUANTIZATION_RECORD}, which names its base")


def compare_base(folder: Path, expected: Mapping[str, str]) -> str:
    """Whether a prefill module was tuned from the base model that D was made of.

    Raises:
        IncompatibleError: from another one.
        UncheckedError: no record that can be read, or no file that both name.
    """
    recorded = _readable_result(folder)["base"]["sha256"]
    return _same_digests(recorded, expected, "tuned from", "D's base is", "base weights")


def _same_digests(
    found: Mapping[str, str], expected: Mapping[str, str], one: str, other: str, what: str
) -> str:
    common = sorted(found.keys() & expected.keys())
    if not common:
        raise UncheckedError(
            f"no {what} file that both name: {', '.join(found) or 'none'} against "
            f"{', '.join(expected) or 'none'}"
        )
    different = [
        f"{name}: {one} {found[name][:SHORT]}, {other} {expected[name][:SHORT]}"
        for name in common
        if found[name] != expected[name]
    ]
    if different:
        raise IncompatibleError(f"other {what}: {enumerated(different)}")
    return f"the same SHA-256 of {', '.join(common)}"


def compare_boundary(folder: Path, module: PrefillModule, manifest: Manifest) -> str:
    """Whether all that name a boundary name one: the manifest, its entry, the tuning record.

    Raises:
        IncompatibleError: they differ.
        UncheckedError: a record that cannot be read.
    """
    named: dict[str, Any] = {
        "the manifest": manifest.boundary,
        f"its entry for {module.task}": module.boundary,
    }
    if (folder / TUNING_RECORD).is_file():
        named["the tuning record"] = _readable_result(folder).get("boundary")
    if len(set(named.values())) > 1:
        values = ", ".join(f"{boundary} in {where}" for where, boundary in named.items())
        raise IncompatibleError(f"boundary: {values}")
    return f"boundary {manifest.boundary} in {', '.join(named)}"


def compare_system(folder: Path, promised: str | None) -> str:
    """Whether a prefill module was tuned for the hand-off; `promised` is the manifest's system.

    Raises:
        IncompatibleError: it was not, or the record says another system than promised.
        UncheckedError: nothing that can be read says how it was tuned.
    """
    known = promised is None or (folder / TUNING_RECORD).is_file()
    recorded = _readable_result(folder).get("system") if known else promised
    if promised is not None and recorded != promised:
        raise IncompatibleError(f"system: {recorded} in the tuning record, {promised} expected")
    if recorded not in TUNED_FOR_THE_HANDOFF:
        raise IncompatibleError(
            f"tuned as {recorded}: it never met a frozen decode module, so that handing its cache "
            "to one is the naive hand-off"
        )
    return f"tuned as {recorded}"
