"""Sandbox: runs one program and its test within limits. A script of its own: it imports no qsun.

Standard input holds the job as JSON: `programs`, the first of which that compiles is run; `test`,
which defines `check`; `entry_point`, which `check` is called with; `token`; and the limits
`cpu_s` and `memory_bytes`. On standard output, a `+` says that the program begins under its limits,
and the token after it that all came to its end.

What it does to the machine is walled by the container this runs in (`container.py`); the limits
here are a second wall. The verdict is not: a program that searches this interpreter can find the
token and say it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from types import CodeType, ModuleType
from typing import Any

OPEN_FILES = 64
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events, or their beginnings, of what a function under test has no need of.
REFUSED = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty."),
    *("subprocess.", "socket.", "ctypes.", "resource.", "signal.pthread_kill", "shutil."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"),
    *("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"),
)


def main() -> None:
    """Run the job, then say the token."""
    job = json.load(sys.stdin)
    write, verdict, token = os.write, os.dup(1), job["token"].encode()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    _limit(job["cpu_s"], job["memory_bytes"])
    sys.addaudithook(_refuse)
    write(verdict, b"+")
    module = ModuleType("solution")
    sys.modules["solution"] = module
    names: dict[str, Any] = module.__dict__
    exec(_first_compiled(job["programs"]), names)
    solution = names[job["entry_point"]]
    exec(compile(job["test"], "<test>", "exec", dont_inherit=True), names)
    names["check"](solution)
    write(verdict, token)


def _limit(cpu_s: int, memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        # No process or thread more; root is exempt from it, not from the container's filter.
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(REFUSED):
        raise PermissionError(f"{event} is refused to a program under test")


def _first_compiled(programs: list[str]) -> CodeType:
    for program in programs[:-1]:
        try:
            return compile(program, "<solution>", "exec", dont_inherit=True)
        except SyntaxError:
            continue
    return compile(programs[-1], "<solution>", "exec", dont_inherit=True)


if __name__ == "__main__":
    main()
