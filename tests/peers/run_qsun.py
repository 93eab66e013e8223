"""`qsun quantize`, with the settings that the request's options hold."""

from __future__ import annotations

import sys
from pathlib import Path

from qsun.records import read_record
from tests.peers.request import Request, Run, installed, main


def quantize(request: Request, out: Path, run: Run) -> None:
    """Run the command; its samples are those of the calibration text that the settings name."""
    from qsun.cli.main import main as qsun

    settings = [
        f"quantize.bits={request.bits}",
        f"quantize.group_size={request.group_size}",
        *request.options["settings"],
    ]
    command = ["quantize", request.options["config"], "--engine", request.options["engine"]]
    sys.argv = ["qsun", *command, "--out", str(out), *(f"--set={one}" for one in settings)]
    try:
        qsun()
    except SystemExit as ended:
        if ended.code:
            raise
    result = read_record(out / "records" / "quantization.json", "quantization").result
    found = sum(map(len, request.samples))
    if result["calibration"]["tokens"] != found:
        raise ValueError(f"other samples: {result['calibration']['tokens']} tokens, not {found}")
    run.search_s = result["cost"]["search_s"]
    run.told = {
        "asymmetric": True,
        "settings": request.options["told"],
        "versions": installed("qsun", "llmcompressor", "compressed-tensors", "torch"),
    }


if __name__ == "__main__":
    main(quantize)
