"""Hostile programs fail, harm nothing, and the next program is judged all the same.

Each is run behind all walls and behind the container alone, without limits and audit hook.
Most are written to pass if their harm is done: it is done, and the answer is right.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from qsun.errors import DataError
from qsun.tasks import container, unit_tests
from qsun.tasks.unit_tests import check_unit_tests

PROJECT = Path(__file__).parent.parent
PROBLEM = {
    "prompt": 'def seven():\n    """Seven."""\n',
    "test": "def check(candidate):\n    assert candidate() == 7\n",
    "entry_point": "seven",
}
HOOK = "    sys.addaudithook(_refuse)\n"
LIMITS = '    _limit(job["cpu_s"], job["memory_bytes"])\n'
LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
# Looks a number of a descriptor up among all that may be there.
EVERY_DESCRIPTOR = "for fd in range(64):\n    try: {}\n    except (OSError, ValueError): pass\n"
SHORT_S = 1.0


def number(call: str) -> int:
    """Of a system call, on this machine."""
    found = container.REFUSED_CALLS[call][container.MACHINES[platform.machine()][0]]
    assert found is not None
    return found


def passes(body: str, timeout_s: float = 5.0) -> bool:
    """Whether a program that does `body` and then answers 7 passes; good ones after it do."""
    hostile = f"{textwrap.indent(body.strip(), '    ')}\n    return 7\n"
    good = "    return 7\n"
    first, *others = check_unit_tests([hostile, good, good], [json.dumps(PROBLEM)] * 3, timeout_s)
    assert others == [True, True]
    return first


@pytest.fixture(params=["all walls", "container alone"])
def walls(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The walls that a program runs behind."""
    script = unit_tests.SANDBOX.read_text()
    assert script.count(HOOK) == script.count(LIMITS) == 1
    if request.param != "all walls":
        script = script.replace(HOOK, "")
    if request.param == "container alone":
        script = script.replace(LIMITS, "")
    weakened = tmp_path / "sandbox.py"
    weakened.write_text(script)
    monkeypatch.setattr(unit_tests, "SANDBOX", weakened)
    return str(request.param)


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[list[Path]]:
    """Files outside that hold a secret, each in a folder of its own."""
    parents = (tmp_path, Path.home(), PROJECT / "exports")
    folders = [parent / f"canary-{uuid4().hex}" for parent in parents]
    files = [folder / "canary" for folder in folders]
    for file in files:
        file.parent.mkdir()
        file.write_text("secret")
    yield files
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def processes_named(name: str) -> list[str]:
    """Every process of the machine of that name, but those that have ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"Name:\t{name}\n" in text and "State:\tZ" not in text:
            found.append(status.parent.name)
    return found


def none_left(name: str) -> bool:
    """Whether what was killed is gone within two seconds; what was not is killed here."""
    deadline = time.monotonic() + 2
    while (left := processes_named(name)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in left:
        os.kill(int(process), signal.SIGKILL)
    return not left


@pytest.mark.usefixtures("walls")
def test_a_program_that_does_no_harm_passes() -> None:
    assert passes("import math, random, datetime, collections, typing, zlib, sqlite3")


# The bombs are of 32 processes or less each, so that a broken wall does not break the machine.
@pytest.mark.parametrize(
    "bomb",
    [
        "for _ in range(5): os.fork()",
        f"{LIBC}for _ in range(5): assert libc.fork() >= 0",
        f"{LIBC}for _ in range(5): assert libc.syscall({number('clone')}, 17, 0, 0, 0, 0) >= 0",
        "import subprocess\nsubprocess.Popen(['sleep', '60'])",
        "os.posix_spawn('/usr/bin/sleep', ['sleep', '60'], {})",
        "import multiprocessing as m\nm.Process(target=print).start()",
    ],
)
def test_a_fork_bomb_makes_no_process(bomb: str, walls: str) -> None:
    name = f"bomb-{uuid4().hex[:10]}"
    named = f"{LIBC}libc.prctl(15, b'{name}', 0, 0, 0)\n" if walls != "all walls" else ""
    # Where a bomb goes off, its parent passes, and its children stay beyond the group's end.
    after = "if os.getpid() != me:\n    os.setsid()\n    time.sleep(60)"
    assert not passes(f"import os, time\nme = os.getpid()\n{named}{bomb}\n{after}")
    assert none_left(name)


def test_what_a_program_has_started_dies_with_its_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the filter that refuses them: their namespace's end is enough."""
    script = unit_tests.SANDBOX.read_text().replace(HOOK, "").replace(LIMITS, "")
    weakened = tmp_path / "sandbox.py"
    weakened.write_text(script)
    monkeypatch.setattr(unit_tests, "SANDBOX", weakened)
    monkeypatch.setattr(container, "REFUSED_CALLS", {"bpf": (321, 280)})
    container._filter.cache_clear()
    name = f"bomb-{uuid4().hex[:10]}"
    bomb = f"""
        import os, time
        {LIBC.strip()}
        libc.prctl(15, b'{name}', 0, 0, 0)
        me = os.getpid()
        for _ in range(4): os.fork()
        if os.getpid() != me:
            os.setsid()
            time.sleep(60)
        """
    try:
        assert passes(textwrap.dedent(bomb))
        assert not passes(f"{textwrap.dedent(bomb)}time.sleep(60)", SHORT_S)
    finally:
        container._filter.cache_clear()
    assert none_left(name)


@pytest.mark.parametrize(
    "endless",
    [
        "while True: pass",
        "import time; time.sleep(3600)",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "class Name(dict):\n    def __eq__(self, other):\n        while True: pass\nreturn Name()",
    ],
)
@pytest.mark.usefixtures("walls")
def test_an_endless_program_is_ended(endless: str) -> None:
    start = time.monotonic()
    assert not passes(endless, timeout_s=0.3)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "threads",
    [
        "import threading\ndef loop():\n    while True: pass\n"
        "for _ in range(4): threading.Thread(target=loop).start()",
        "import _thread\ndef loop():\n    while True: pass\n_thread.start_new_thread(loop, ())",
    ],
)
@pytest.mark.usefixtures("walls")
def test_threads_that_never_end_do_not_begin(threads: str) -> None:
    assert not passes(threads)


@pytest.mark.parametrize("walls", ["all walls", "no audit hook"], indirect=True)
@pytest.mark.usefixtures("walls")
def test_ten_gigabytes_are_not_had() -> None:
    refused = "try: {}\nexcept MemoryError: return 7\nreturn 8"
    assert passes(refused.format("bytearray(10 * 2**30)"))
    assert passes(refused.format("[bytearray(2**20) for _ in range(10240)]"))
    anonymous = "libc.mmap(None, ctypes.c_size_t(10 * 2**30), 3, 34, -1, 0) != -1"
    assert not passes(f"{LIBC}libc.mmap.restype = ctypes.c_long\nassert {anonymous}")


@pytest.mark.parametrize(
    "beside",
    [
        "libc.shmget(0, ctypes.c_size_t(2**30), 0o1600)",
        f"libc.syscall({number('memfd_create')}, b'm', 0)",
        "libc.msgget(0, 0o1600)",
    ],
)
@pytest.mark.usefixtures("walls")
def test_there_is_no_memory_beside_the_limit(beside: str) -> None:
    assert not passes(f"{LIBC}assert {beside} >= 0")


@pytest.mark.parametrize(
    "harm",
    [
        "import os; os.remove('{file}')",
        "import os; os.truncate('{file}', 0)",
        "import os; os.rename('{file}', '{file}-gone')",
        "import os; os.chmod('{file}', 0)",
        "import shutil; shutil.rmtree('{folder}')",
        "open('{file}', 'w').write('spoilt')",
        "open('{folder}/made', 'w')",
        "import os; os.symlink('/', '{folder}/made')",
        "import os; os.mkdir('{folder}/made')",
        LIBC + "assert libc.unlink(b'{file}') == 0",
        LIBC + "assert libc.mount(None, b'/', None, 32 | 4096, None) == 0",
        "assert open('{file}').read() == 'secret'",
        "import os; assert os.listdir('{folder}')",
    ],
)
@pytest.mark.usefixtures("walls")
def test_files_outside_are_neither_seen_nor_changed(harm: str, canaries: list[Path]) -> None:
    modes = [file.stat().st_mode for file in canaries]
    harms = [harm.format(file=file, folder=file.parent) for file in canaries]
    programs = [f"{textwrap.indent(text, '    ')}\n    return 7\n" for text in harms]
    verdicts = check_unit_tests([*programs, "    return 7\n"], [json.dumps(PROBLEM)] * 4)
    assert verdicts == [False, False, False, True]
    assert [file.read_text() for file in canaries] == ["secret"] * 3
    assert [os.listdir(file.parent) for file in canaries] == [["canary"]] * 3  # noqa: PTH208
    assert [file.stat().st_mode for file in canaries] == modes


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "/etc/shadow", "/etc/hostname", "/root/.bashrc", "/var/lib/dpkg/status"),
        *("/proc/1/environ", "/proc/self/environ", "/proc/self/maps", "/proc/cmdline"),
        *("/sys/kernel", "/dev/vda", "/dev/sda", "/dev/kmsg", "/dev/shm", "/run", "/var/tmp"),
        *(str(PROJECT / "pyproject.toml"), str(PROJECT / "qsun"), str(PROJECT / ".git/config")),
    ],
)
@pytest.mark.usefixtures("walls")
def test_what_a_machine_keeps_is_not_seen(path: str) -> None:
    assert not passes(f"import os; assert os.path.lexists({path!r})")


@pytest.mark.parametrize("folder", ["/", "/usr", "/usr/lib", sys.prefix, sys.base_prefix, "/dev"])
@pytest.mark.usefixtures("walls")
def test_what_is_seen_cannot_be_written(folder: str) -> None:
    made = Path(folder, f"made-{uuid4().hex}")
    try:
        assert not passes(f"import os; os.mkdir({str(made)!r})")
        assert not made.exists()
    finally:
        if made.exists():
            made.rmdir()


@pytest.mark.usefixtures("walls")
def test_tmp_is_small_and_ones_own() -> None:
    name = f"filled-{uuid4().hex}"
    fill = f"""
        for part in range(32):
            with open(f'/tmp/{name}-{{part}}', 'wb') as stream: stream.write(bytes(2**20))
        """
    try:
        assert not passes(textwrap.dedent(fill))
        left = list(Path("/tmp").glob(f"{name}*"))
        assert left == []
    finally:
        for path in Path("/tmp").glob(f"{name}*"):
            path.unlink()
    assert passes("import os; assert os.getcwd() == '/tmp/own' and os.listdir() == []")
    python = [Path(sys.prefix), Path(sys.base_prefix)]
    shown = {path.parts[2] for path in python if path.is_relative_to("/tmp")} | {"own"}
    assert passes(f"import os; assert set(os.listdir('/tmp')) <= {shown!r}")


@pytest.mark.usefixtures("walls")
def test_nothing_arrives_at_a_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        call = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        assert not passes(call)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.usefixtures("walls")
def test_the_environment_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSUN_TEST_SECRET", "as-secret-as-can-be")
    search = """
        import glob, os
        found = list(map(str, os.environ.items()))
        for path in glob.glob('/proc/*/environ'):
            try: found.append(open(path, 'rb').read().decode(errors='replace'))
            except OSError: pass
        assert any('as-secret-as-can-be' in text for text in found)
        """
    assert not passes(textwrap.dedent(search))


@pytest.mark.usefixtures("walls")
def test_other_processes_are_out_of_reach() -> None:
    reached: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: reached.append(number))
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            assert not passes(f"import os; os.kill({victim.pid}, 9)")
            assert not passes(f"{LIBC}assert libc.kill({victim.pid}, 9) == 0")
            assert not passes(f"{LIBC}assert libc.ptrace(16, {victim.pid}, 0, 0) == 0")
            assert not passes(f"import os; os.kill({os.getpid()}, {int(signal.SIGUSR1)})")
            # Inside, the parent is the container's first process, to which a signal is nothing.
            passes(f"import os; os.kill(os.getppid(), {int(signal.SIGUSR1)})")
            assert not passes(f"{LIBC}assert libc.ptrace(16, 1, 0, 0) == 0")
            assert victim.poll() is None
        finally:
            victim.kill()
            signal.signal(signal.SIGUSR1, before)
    assert reached == []


@pytest.mark.parametrize(
    "call",
    [
        "libc.unshare(0x10000000)",  # CLONE_NEWUSER
        f"libc.syscall({number('keyctl')}, 0, -3, 0)",  # the session's keyring
        f"libc.syscall({number('io_uring_setup')}, 1, ctypes.create_string_buffer(128))",
        f"libc.syscall({number('pidfd_open')}, 1, 0)",
        "libc.setuid(0) or 1; assert libc.geteuid() == 0",
        "libc.chroot(b'/usr')",
        "libc.socket(2, 1, 0)",
    ],
)
@pytest.mark.usefixtures("walls")
def test_calls_past_python_are_refused(call: str) -> None:
    if "; assert" in call:
        assert not passes(f"{LIBC}{call}")
    else:
        assert not passes(f"{LIBC}assert {call} >= 0")


@pytest.mark.parametrize(
    "trick",
    [
        "print('0' * 32, flush=True); import os; os._exit(0)",
        "import os, sys; sys.stdout.write('+' + '0' * 32); sys.stdout.flush(); os._exit(0)",
        "import json, sys; token = json.load(sys.stdin)['token']; print(token); return 8",
        # The job, wherever a descriptor of it may be; then every descriptor gets its token.
        "import json, os\njobs = []\n"
        + EVERY_DESCRIPTOR.format("jobs.append(json.loads(os.pread(fd, 2**16, 0)))")
        + "assert jobs\n"
        + EVERY_DESCRIPTOR.format("os.write(fd, jobs[0]['token'].encode())")
        + "return 8",
        "import os\n" + EVERY_DESCRIPTOR.format("os.write(fd, b'+' + b'0' * 32)") + "return 8",
        f"import os\n{EVERY_DESCRIPTOR.format('os.close(fd)')}return 8",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os; os.abort()",
        "import os; os.execv('/usr/bin/true', ['true'])",
        "import os; os.kill(os.getpid(), 9)",
        "import atexit; atexit.register(lambda: print('0' * 32)); return 8",
        "global check\ndef check(candidate): pass\nreturn 8",
        "import builtins; builtins.check = lambda candidate: None; return 8",
        "import sys; sys.modules['solution'].check = lambda candidate: None; return 8",
        "import builtins; builtins.AssertionError = ZeroDivisionError; return 8",
        "import builtins; builtins.exec = builtins.compile = print; return 8",
        "import sys; sys.stdout.write('x' * 2**26); return 8",
        "import os\n"
        + EVERY_DESCRIPTOR.format("[os.write(fd, b'x' * 2**16) for _ in range(256)]")
        + "return 8",
        "def deeper(): return deeper()\ndeeper()",
        "import sys; sys.setrecursionlimit(2**30)\ndef deeper(): return [deeper()]\ndeeper()",
        "x = []\nfor _ in range(10**6): x = [x]\nreturn repr(x)",
    ],
)
@pytest.mark.usefixtures("walls")
def test_a_trick_does_not_pass(trick: str) -> None:
    assert not passes(trick, timeout_s=SHORT_S)


def test_what_is_done_before_the_test_is_of_no_use() -> None:
    answer = json.dumps(PROBLEM)
    wrong = "def seven():\n    return 8\n\n\n"
    early = [
        "def check(candidate):\n    pass\n",
        "raise SystemExit(0)\n",
        "import os\nos._exit(0)\n",
    ]
    programs = [wrong + text for text in early]
    assert check_unit_tests([*programs, "    return 7\n"], [answer] * 4) == [False] * 3 + [True]


@pytest.fixture
def unchecked() -> Iterator[Callable[[], None]]:
    """Forgets what is known of bubblewrap, now and at the end."""
    caches = (container._checked, container._bwrap, container._walls)

    def forget() -> None:
        for cached in caches:
            cached.cache_clear()

    forget()
    yield forget
    forget()


@pytest.mark.usefixtures("unchecked")
def test_without_bubblewrap_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for call in (container.require_sandbox, lambda: passes("")):
        with pytest.raises(DataError, match=r"not installed: apt install bubblewrap"):
            call()


@pytest.mark.usefixtures("unchecked")
def test_where_bubblewrap_is_refused_nothing_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho No permissions to create new namespace >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="does not work here: No permissions to create"):
        passes("")


@pytest.mark.usefixtures("unchecked")
def test_bubblewrap_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []
    popen = container._popen

    def counted(view: list[str], arguments: list[str], *streams: Any) -> subprocess.Popen[bytes]:
        tried.append(arguments)
        return popen(view, arguments, *streams)

    monkeypatch.setattr(container, "_popen", counted)
    container.require_sandbox()
    container.require_sandbox()
    assert passes("")
    assert len([arguments for arguments in tried if "-c" in arguments]) == 1


def test_a_container_that_does_not_start_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "sandbox.py"
    broken.write_text("raise RuntimeError('no good')\n")
    monkeypatch.setattr(unit_tests, "SANDBOX", broken)
    with pytest.raises(DataError, match=r"(?s)did not start: .*no good"):
        passes("")
