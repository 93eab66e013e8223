"""Processes that tests start and look for."""

from __future__ import annotations

import time
from pathlib import Path

LOOK_S = 0.05
PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""
"""A program that leaves its child's number in a file, and ends by itself much later."""


def runs(process: int) -> bool:
    """Whether it is there, and not merely waiting to be reaped."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(") ")[2][0] != "Z"


def ends(process: int, within_s: float = 20) -> bool:
    """Whether it is gone before some seconds have passed."""
    until = time.monotonic() + within_s
    while runs(process):
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_S)
    return True
