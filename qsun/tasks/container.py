"""Container: a process that has Python and nothing else of the machine, by Debian's bubblewrap.

It sees the interpreter's folders and /usr, read-only, and an empty /tmp of its own that ends with
it: no home, no network, no other process, no environment. A process more is refused by a filter
of system calls, since Linux does not count the processes of root, whatever uid a container shows.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO

from qsun.errors import DataError

NOBODY = "65534"
TMP_BYTES = 16 * 2**20
SCRIPT = "/program.py"  # where a container sees its script
CHECK_S = 60.0
OWN = "/tmp/own"  # where a program begins; Python itself may lie elsewhere below /tmp
REMEDY = "apt install bubblewrap"

# The number of each refused system call on x86-64 and on 64-bit ARM; None where it has none.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
REFUSED_CALLS: dict[str, tuple[int, int | None]] = {
    # Processes and threads, namespaces.
    **{"clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435)},
    **{"unshare": (272, 97), "setns": (308, 268)},
    # Other processes.
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438)},
    **{"pidfd_send_signal": (424, 424)},
    # The network, and keys, which are the user's and in no namespace.
    **{"socket": (41, 198), "socketpair": (53, 199)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # Memory that the limit of a process does not count.
    **{"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447)},
    # Mounts.
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"mount_setattr": (442, 442)},
    # What of the kernel is wide and of no use here.
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"io_uring_setup": (425, 425)},
}
# Classic BPF (linux/bpf_common.h, linux/seccomp.h): code, and what a filter returns.
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_AT, MACHINE_AT = 0, 4
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refused is EPERM
OTHER_ABI = 0x40000000  # x32 calls of x86-64 have this bit


def require_sandbox() -> None:
    """Make sure, once a process, that generated programs can be run in containers here.

    Raises:
        DataError: bubblewrap is missing, or the machine refuses it.
    """
    _checked()


def start(
    script: Path, stdin: IO[bytes], stdout: int, stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Run a Python script in a container, in a process group that is killed as a whole.

    The container ends with its first process, with the group, and with the thread that started it.

    Raises:
        DataError: as `require_sandbox`.
    """
    require_sandbox()
    view = ["--ro-bind", str(script), SCRIPT]
    return _popen(view, ["-B", SCRIPT], stdin, stdout, stderr)


@functools.cache
def _checked() -> None:
    if _bwrap() is None:
        raise DataError(
            f"generated programs are run in bubblewrap alone, and it is not installed: {REMEDY}"
        )
    if platform.machine() not in MACHINES:
        raise DataError(
            f"generated programs are run on {' and '.join(MACHINES)} alone, "
            f"and this machine is {platform.machine()}"
        )
    process = _popen([], ["-S", "-c", ""], subprocess.DEVNULL, subprocess.DEVNULL, subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=CHECK_S)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    if process.returncode:
        raise DataError(
            "generated programs are run in bubblewrap alone, and it does not work here: "
            f"{said.decode(errors='replace').strip() or f'exit status {process.returncode}'}\n"
            f"It needs user namespaces (in Docker: --security-opt seccomp=unconfined) and "
            f"version 0.7 or later ({REMEDY})"
        )


def _popen(
    view: list[str],
    arguments: list[str],
    stdin: int | IO[bytes],
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
) -> subprocess.Popen[bytes]:
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as stream:
            stream.write(_filter())
        return subprocess.Popen(
            [
                *_walls(),
                *view,
                *("--remount-ro", "/", "--seccomp", str(reader)),
                *("--", sys.executable, "-I", *arguments),
            ],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd="/",
            env={},
            pass_fds=[reader],
            start_new_session=True,
        )
    finally:
        os.close(reader)


@functools.cache
def _bwrap() -> str | None:
    return shutil.which("bwrap")


@functools.cache
def _walls() -> list[str]:
    """The part of the command that is the same for every container."""
    return [
        _bwrap() or "bwrap",
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL"),
        *("--hostname", "sandbox", "--new-session", "--die-with-parent", "--clearenv"),
        *("--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--dir", OWN, "--chdir", OWN),
        # No /proc, and of devices what reads as nothing or as chance.
        *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"),
        *("--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
        *_libraries(),
        *_interpreter(),
    ]


def _libraries() -> list[str]:
    options = []
    for folder in sorted(Path("/").glob("lib*")):
        if folder.is_symlink():
            options += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            options += ["--ro-bind", str(folder), str(folder)]
    return options


def _interpreter() -> list[str]:
    """The folders of Python and of its virtual environment, under each name they have."""
    folders = [Path(sys.base_prefix), Path(sys.prefix)]
    names = dict.fromkeys([*folders, *(folder.resolve() for folder in folders)])
    shown = [str(name) for name in names if not name.is_relative_to("/usr")]
    return [option for name in shown for option in ("--ro-bind", name, name)]


@functools.cache
def _filter() -> bytes:
    """Refuses `REFUSED_CALLS`, and kills whoever makes calls of another machine's numbering."""
    column, machine = MACHINES[platform.machine()]
    numbers = [call[column] for call in REFUSED_CALLS.values() if call[column] is not None]
    steps = [
        (LOAD, 0, 0, MACHINE_AT),
        (EQUAL, 1, 0, machine),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, len(numbers) + 1, 0, OTHER_ABI),
        # Of those equal to none, the last goes on to the step after it, which allows.
        *((EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
