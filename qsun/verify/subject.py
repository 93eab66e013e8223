"""The subject of a verification: the modules that are to be shown to belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.bundle import MANIFEST, Bundle, Manifest, PrefillModule
from qsun.errors import IncompatibleError, QsunError, bullet_list
from qsun.records import read_record

PAIR_TASK = "prefill"
TUNING_RECORD = Path("records") / "tuning.json"
DEFAULT_BOUNDARY = "n-1"
KINDS = ("lora", "full")

_TEXT, _TEXT_OR_NONE = (str,), (str, type(None))
_NUMBER_OR_NONE = (int, float, type(None))
_MANIFEST_FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "decode_path", "decode_scheme", "tokenizer_path"), _TEXT),
    **dict.fromkeys(("boundary", "kv_cache_dtype"), _TEXT),
    **dict.fromkeys(("base", "kv_layout", "files"), (dict,)),
    "base_path": _TEXT_OR_NONE,
    "max_tokens": (int,),
}
_MODULE_FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "path", "module", "boundary"), _TEXT),
    "system": _TEXT_OR_NONE,
    "rank": (int, type(None)),
    **dict.fromkeys(("reference_loss", "base_loss"), _NUMBER_OR_NONE),
}
_LAYOUT_FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("layers", "kv_heads", "head_dim", "max_tokens", "vocabulary"), (int,)),
    **dict.fromkeys(("dtype", "rope_type"), _TEXT),
    "rope_theta": (int, float),
    "rope_parameters": (list, tuple, dict),
    "sliding_window": (int, type(None)),
}


@dataclass(frozen=True)
class Subject:
    """What is verified: a bundle, or a bare pair of folders.

    `prefill` maps each task to its module's folder; a pair's task is called `prefill`. `manifest`,
    `folder` and `digest` are the bundle's, None for a pair. `tokenizer` is the folder whose
    tokenizer makes the prompts; None where a pair has none.
    """

    decode: Path
    base: Path | None
    prefill: dict[str, Path]
    tokenizer: Path | None
    boundary: str
    manifest: Manifest | None
    folder: Path | None
    digest: str | None

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Subject:
        """The modules of a bundle; no file but its manifest is looked at.

        Raises:
            IncompatibleError: names every field of the manifest that holds what it cannot.
        """
        wrong = _impossible_fields(bundle.manifest)
        if wrong:
            raise IncompatibleError(
                f"{bundle.folder / MANIFEST} is not a bundle's manifest:\n{bullet_list(wrong)}\n"
                "Export the bundle again."
            )
        return cls(
            decode=bundle.decode,
            base=bundle.base,
            prefill=bundle.prefill,
            tokenizer=bundle.tokenizer,
            boundary=bundle.manifest.boundary,
            manifest=bundle.manifest,
            folder=bundle.folder,
            digest=bundle.digest,
        )

    @classmethod
    def from_pair(cls, prefill: Path, decode: Path, base: Path | None) -> Subject:
        """A prefill and a decode module; `base` is the checkpoint that an adapter is put on.

        The boundary is the one that the prefill module's tuning record names, n-1 without one.
        """
        known = [
            folder
            for folder in (decode, base, prefill)
            if folder is not None and (folder / "tokenizer.json").is_file()
        ]
        return cls(
            decode=decode,
            base=base,
            prefill={PAIR_TASK: prefill},
            tokenizer=known[0] if known else None,
            boundary=_recorded_boundary(prefill),
            manifest=None,
            folder=None,
            digest=None,
        )


def _recorded_boundary(prefill: Path) -> str:
    try:
        boundary = read_record(prefill / TUNING_RECORD, "tuning").result["boundary"]
    except (QsunError, KeyError, TypeError):  # what is wrong with the record, the checks say
        return DEFAULT_BOUNDARY
    return str(boundary)


def _impossible_fields(manifest: Manifest) -> list[str]:
    wrong = _of_other_types(vars(manifest), _MANIFEST_FIELDS, "")
    for module in manifest.prefill:
        wrong += _of_other_types(vars(module), _MODULE_FIELDS, f"prefill {module.task}: ")
        if module.module not in KINDS:
            wrong.append(f"prefill {module.task}: module {module.module!r} is none of {KINDS}")
    wrong += _impossible_layout(manifest.kv_layout)
    if not manifest.prefill:
        wrong.append("prefill: no module is named")
    wrong += [f"files: {name}: no digest" for name in _without_text(manifest.files)]
    wrong += [f"records: {name!r} is no path" for name in manifest.records if not _is_text(name)]
    if not isinstance(manifest.max_tokens, int) or manifest.max_tokens < 1:
        wrong.append(f"max_tokens: {manifest.max_tokens!r} is no number of tokens")
    return wrong + _repeated_tasks(manifest.prefill)


def _impossible_layout(layout: Any) -> list[str]:
    if not isinstance(layout, dict):
        return []  # named already
    missing = [f"kv_layout: {name} is missing" for name in _LAYOUT_FIELDS.keys() - layout.keys()]
    unknown = [f"kv_layout: {name} is unknown" for name in layout.keys() - _LAYOUT_FIELDS.keys()]
    known = {name: kinds for name, kinds in _LAYOUT_FIELDS.items() if name in layout}
    return sorted(missing + unknown) + _of_other_types(layout, known, "kv_layout: ")


def _of_other_types(
    found: Mapping[str, Any], expected: Mapping[str, tuple[type, ...]], where: str
) -> list[str]:
    return [
        f"{where}{name}: {found[name]!r} is no {' or '.join(kind.__name__ for kind in kinds)}"
        for name, kinds in expected.items()
        if not isinstance(found[name], kinds) or isinstance(found[name], bool)
    ]


def _without_text(mapping: Any) -> list[str]:
    if not isinstance(mapping, dict):
        return []  # named already
    return [name for name, value in mapping.items() if not _is_text(value)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _repeated_tasks(modules: tuple[PrefillModule, ...]) -> list[str]:
    tasks = [str(module.task) for module in modules]
    return [f"prefill: {task} is named twice" for task in {*tasks} if tasks.count(task) > 1]
