"""Loading: the modules of a system as a pair, each kept as long as the next system needs it too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qsun.bundle import Bundle, read_bundle
from qsun.checkpoint_files import read_config_file
from qsun.decode_checkpoint import load_decode
from qsun.errors import ConfigError, nearest
from qsun.evaluate.pair import Pair
from qsun.evaluate.systems import System
from qsun.handoff import Boundary
from qsun.models import load_tokenizer, serving_dtype
from qsun.prefill_module import ADAPTER_CONFIG, load_prefill
from qsun.verdict import require_verdict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEVELS = ("static", "numeric")


@dataclass
class Loader:
    """Opens pairs over one base model, on an accelerator where there is one."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    boundary: Boundary
    max_tokens: int
    dtype: str
    _open: dict[Path, PreTrainedModel] = field(default_factory=dict)

    def pair(self, system: System) -> Pair:
        """The system's modules; those that it shares with the one before are not opened again."""
        wanted = {system.prefill, system.decode}
        for folder in self._open.keys() - wanted:
            del self._open[folder]
        decode = self._decode(system.decode)
        prefill = decode if system.one_model else self._prefill(system.prefill)
        return Pair(prefill, decode, self.tokenizer, self.boundary, self.max_tokens)

    def _decode(self, folder: Path) -> PreTrainedModel:
        if folder not in self._open:
            if (folder / ADAPTER_CONFIG).exists():  # a fine-tuned model that is one adapter
                return self._prefill(folder)
            self._open[folder] = load_decode(folder, self.dtype).to(device())
        return self._open[folder]

    def _prefill(self, folder: Path) -> PreTrainedModel:
        if folder not in self._open:
            self._open[folder] = load_prefill(folder, self.base, self.dtype).to(device())
        return self._open[folder]


def device() -> str:
    """Where modules are opened."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_bundle_pair(
    folder: Path, task: str, allowed: tuple[str, ...] = (), dtype: str | None = None
) -> Pair:
    """A verified bundle's decode module and the prefill module of one task.

    `dtype` in place of the bundle's own is for comparing.

    Raises:
        IncompatibleError: no bundle, or one without a verdict that passes.
        ConfigError: the bundle has no such task.
    """
    bundle = read_bundle(folder.absolute())
    require_verdict(bundle, LEVELS, allowed)
    if task not in bundle.prefill:
        raise ConfigError(f"{folder} has no task {task!r} ({nearest(task, bundle.prefill)})")
    loader = bundle_loader(bundle, bundle.base or bundle.prefill[task], dtype)
    return loader.pair(System("", bundle.prefill[task], bundle.decode))


def bundle_loader(bundle: Bundle, base: Path, dtype: str | None = None) -> Loader:
    """A loader for a bundle's modules; `base` is the checkpoint under its adapters."""
    config = read_config_file(bundle.decode / "config.json")
    return Loader(
        base=base,
        tokenizer=load_tokenizer(bundle.tokenizer),
        boundary=Boundary(bundle.manifest.boundary),
        max_tokens=bundle.manifest.max_tokens,
        dtype=dtype or serving_dtype(config),
    )
