"""The report beside a quantization's record: what was covered, a text and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsun.calibrate.coverage import coverage
from qsun.calibrate.pieces import whole_texts
from qsun.calibrate.samples import SampleSet
from qsun.files import write_atomically
from qsun.jobs.block_walk import pieces_of
from qsun.jobs.prepare import Prepared
from qsun.layer_picture import write_picture
from qsun.quantize.report import report
from qsun.records import PICTURE, REPORT


def covered(prepared: Prepared, calibration: SampleSet) -> list[dict[str, Any]]:
    """What each calibration source gives the engine to see."""
    settings, samples = prepared.settings, calibration.samples
    if settings.engine == "qsun":
        shares = {source.name: source.weight for source in prepared.calibration.sources}
        pieces = pieces_of(samples, shares, settings.search)
    else:
        pieces = whole_texts(samples, settings.search.batch_tokens)
    return [asdict(one) for one in coverage(samples, pieces)]


def write_report(name: str, record: Mapping[str, Any], folder: Path) -> None:
    """Write text and picture of a quantization's record, as plain values, below `folder`."""
    path, picture = folder / REPORT, folder / PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = write_picture(name, record["result"]["quantization"]["layers"], picture)
    write_atomically(path, report(name, record, picture.name, text).encode())
