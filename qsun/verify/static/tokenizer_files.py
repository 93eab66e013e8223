"""Tokenizers and chat templates as files: do two folders make the same tokens of a text?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qsun.errors import IncompatibleError, ModelError, UncheckedError
from qsun.verify.static.json_files import read_mapping
from qsun.verify.steps import enumerated

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
ROLES = ("bos_token", "eos_token", "pad_token")
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder with, or without, a tokenizer. Each file is read when first asked for, and once.

    Its properties raise `ModelError` where a file cannot be read.
    """

    path: Path

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """Its `tokenizer.json`."""
        return read_mapping(self.path / TOKENIZER)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its `tokenizer_config.json`, empty where there is none."""
        path = self.path / SETTINGS
        return read_mapping(path) if path.exists() else {}

    @cached_property
    def template(self) -> str | None:
        """Its chat template; named ones come as one JSON text, None where it has none."""
        path = self.path / TEMPLATE
        if not path.exists():
            template = self.settings.get("chat_template")
            if template is None:
                return None
            text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
            return text.removesuffix("\n")
        try:
            return path.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.parent.name}/{TEMPLATE} cannot be read: {error}") from error

    @property
    def highest_id(self) -> int:
        """The highest id that its tokenizer gives."""
        vocabulary = self.tokenizer["model"]["vocab"]
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        added = [entry["id"] for entry in self.tokenizer.get("added_tokens") or []]
        return max(map(int, [*ids, *added]))


def require_tokenizer(reference: TokenizerFolder) -> str:
    """What the tokenizer is that all others are compared with.

    Raises:
        UncheckedError: it is not a `tokenizer.json`.
        ModelError: there is none, or a file that cannot be read.
    """
    if not (reference.path / TOKENIZER).is_file():
        _without_tokenizer(reference.path)
        raise ModelError(f"{reference.path.name} has no {TOKENIZER}")
    template = "no chat template" if reference.template is None else "a chat template"
    roles = [f"{role} {_token(reference.settings.get(role))}" for role in ROLES]
    return f"{reference.highest_id + 1} ids, {', '.join(roles)}, {template}"


def compare_tokenizers(folder: TokenizerFolder, reference: TokenizerFolder) -> str:
    """What a folder's tokenizer has in common with the reference's.

    Raises:
        IncompatibleError: names what differs, with an example of both.
        UncheckedError: a tokenizer that is not a `tokenizer.json`.
        ModelError: one that cannot be read.
    """
    if not (folder.path / TOKENIZER).is_file():
        return _without_tokenizer(folder.path)
    differences = _differences(folder, reference)
    differences += _role_differences(folder, reference)
    if differences:
        raise IncompatibleError(enumerated(differences))
    return "the same tokens, ids, merges, special tokens and roles"


def _without_tokenizer(folder: Path) -> str:
    others = [name for name in OTHER_TOKENIZERS if (folder / name).exists()]
    if others:
        raise UncheckedError(f"{folder.name} has its tokenizer in {others[0]} alone, not compared")
    return "it has no tokenizer of its own"


def _differences(folder: TokenizerFolder, reference: TokenizerFolder) -> list[str]:
    own, expected = ((one.path / TOKENIZER).read_bytes() for one in (folder, reference))
    if own == expected:
        return []
    one, other = folder.tokenizer, reference.tokenizer
    return [
        *_entry_differences("vocabulary", _vocabulary(one), _vocabulary(other)),
        *_entry_differences("merge", _merges(one), _merges(other)),
        *_entry_differences("special token", _added(one), _added(other)),
        *_entry_differences("model setting", _model_settings(one), _model_settings(other)),
        *_step_differences(one, other),
    ]


def _entry_differences(what: str, one: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[str]:
    if one == other:
        return []
    different = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    key = different[0]
    example = f"{key!r} is {one.get(key)} here, {other.get(key)} expected"
    return [f"{what}: {len(different)} entries differ, for example {example}"]


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram: a token's place is its id
        return {entry[0]: (place, entry[1]) for place, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _merges(tokenizer: Mapping[str, Any]) -> dict[int, tuple[str, ...]]:
    """Merges by rank; older files write a pair as one text."""
    merges = tokenizer["model"].get("merges") or []
    return {
        rank: tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)
        for rank, merge in enumerate(merges)
    }


def _added(tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    entries = tokenizer.get("added_tokens") or []
    return {
        entry["content"]: {key: value for key, value in entry.items() if value and key != "content"}
        | {"id": entry["id"]}
        for entry in entries
    }


def _model_settings(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """All of the model but vocabulary and merges; what is off is as if it were not there."""
    model = tokenizer["model"]
    return {key: value for key, value in model.items() if value and key not in ("vocab", "merges")}


def _step_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Steps of tokenizing that differ once what a file leaves to defaults is written out."""
    if all(one.get(step) == other.get(step) for step in STEPS):
        return []
    one, other = _written_out(one), _written_out(other)
    return [
        f"{step}: {_short(one.get(step))} here, {_short(other.get(step))} expected"
        for step in STEPS
        if one.get(step) != other.get(step)
    ]


def _written_out(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    steps = {step: tokenizer.get(step) for step in STEPS}
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": EMPTY_MODEL, **steps})
    try:
        return dict(json.loads(Tokenizer.from_str(text).to_str()))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{TOKENIZER} cannot be read: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _role_differences(folder: TokenizerFolder, reference: TokenizerFolder) -> list[str]:
    one, other = folder.settings, reference.settings
    return [
        f"{role}: {_token(one.get(role))!r} here, {_token(other.get(role))!r} expected"
        for role in ROLES
        if _token(one.get(role)) != _token(other.get(role))
    ]


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def compare_templates(folder: TokenizerFolder, reference: TokenizerFolder) -> str:
    """Whether a folder writes chats as the reference does.

    Raises:
        IncompatibleError: says where the texts part.
        ModelError: a file that cannot be read.
    """
    one, other = folder.template, reference.template
    if one is None:
        return "it has no chat template of its own"
    if one == other:
        return f"the same text, {len(one)} characters"
    if other is None:
        raise IncompatibleError("it has a chat template, the tokenizer that makes prompts has none")
    start = next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1),
        min(len(one), len(other)),
    )
    raise IncompatibleError(
        f"the chat templates part at character {start}: {one[start : start + 30]!r} here, "
        f"{other[start : start + 30]!r} expected"
    )
