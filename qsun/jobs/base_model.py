"""The base model that a bundle's manifest names, fetched and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.errors import IncompatibleError
from qsun.models import ModelSource, checkpoint_folder, fingerprint, locate, read_config
from qsun.models import serving_dtype as dtype_of
from qsun.skeleton import skeleton


def fetch_base(named: Mapping[str, Any], scratch: Path) -> Path:
    """The full-precision checkpoint that a manifest's `base` names; converted to `scratch`.

    Raises:
        ModelError: it is not to be had.
        IncompatibleError: it is not the one that the bundle was made from.
    """
    source = locate(named["model"], named["revision"], Path())
    config = read_config(source)
    folder = checkpoint_folder(source, skeleton(config), scratch, dtype_of(config))
    wanted: dict[str, str] = named["sha256"]
    found = fingerprint(source, folder) | fingerprint(ModelSource(folder=folder), folder)
    changed = [name for name in wanted if name in found and found[name] != wanted[name]]
    if changed:
        raise IncompatibleError(
            f"{named['model']} is not the base model of this bundle: other digests of "
            f"{', '.join(changed)}. Give the right one by --base."
        )
    return folder
