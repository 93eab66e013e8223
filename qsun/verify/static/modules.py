"""The modules of a subject, opened for the static checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qsun.bundle import Manifest, PrefillModule
from qsun.kv_layout import KvLayout
from qsun.verify.static.adapters import is_adapter
from qsun.verify.static.contract import manifest_layout
from qsun.verify.static.model_folder import ModelFolder
from qsun.verify.static.tokenizer_files import TokenizerFolder
from qsun.verify.subject import Subject

EXPORT_AGAIN = "Export the bundle again from modules that belong together."
FETCH_AGAIN = "Fetch the bundle again, or export it again."


@dataclass(frozen=True)
class Modules:
    """A subject's folders. `full` holds the prefill modules that are checkpoints, by task.

    `tokenizer` is the one that all others must equal.
    """

    subject: Subject
    decode: ModelFolder
    base: ModelFolder | None
    full: Mapping[str, ModelFolder]
    tokenizer: TokenizerFolder | None

    @property
    def manifest(self) -> Manifest | None:
        """The bundle's manifest, None for a bare pair."""
        return self.subject.manifest

    @property
    def contract(self) -> KvLayout:
        """The KV layout that all must have: the manifest's, or a bare pair's decode module's.

        Raises:
            QsunError: it cannot be read.
        """
        return self.decode.layout if self.manifest is None else manifest_layout(self.manifest)

    @property
    def checkpoints(self) -> dict[str, ModelFolder]:
        """Every full checkpoint by what it is."""
        base = {} if self.base is None else {"base model": self.base}
        full = {f"task {task}": folder for task, folder in self.full.items()}
        return {"decode module": self.decode, **base, **full}

    def entry(self, task: str) -> PrefillModule | None:
        """What the manifest says of a task's module, None for a bare pair."""
        entries = () if self.manifest is None else self.manifest.prefill
        return next((entry for entry in entries if entry.task == task), None)

    def lora(self, task: str) -> bool:
        """Whether a task's module is an adapter: by the manifest, of a pair by its files."""
        return task not in self.full

    def folder(self, task: str) -> Path:
        """A task's module's folder."""
        return self.subject.prefill[task]


def open_modules(subject: Subject) -> Modules:
    """The modules of a subject; of their files, none is read yet."""
    kinds = {} if subject.manifest is None else {m.task: m.module for m in subject.manifest.prefill}
    full = {
        task: ModelFolder(folder)
        for task, folder in subject.prefill.items()
        if (kinds[task] != "lora" if kinds else not is_adapter(folder))
    }
    base = None if subject.base is None else ModelFolder(subject.base)
    tokenizer = None if subject.tokenizer is None else TokenizerFolder(subject.tokenizer)
    return Modules(subject, ModelFolder(subject.decode), base, full, tokenizer)


def remedy(modules: Modules, action: str) -> str:
    """What to do: `action`, and in a bundle's case its export again."""
    return action if modules.manifest is None else f"{action} {EXPORT_AGAIN}"
