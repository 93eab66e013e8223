"""Unit tests: whether a response's function passes the test that comes with its problem."""

from __future__ import annotations

import json
import os
import re
import secrets
import selectors
import signal
import tempfile
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qsun.errors import DataError
from qsun.tasks.container import require_sandbox, start

SANDBOX = Path(__file__).with_name("sandbox.py")
TIMEOUT_S = 10.0  # from when a program begins
START_S = 60.0
BEGAN = b"+"
CPU_S = 10
MEMORY_BYTES = 512 * 2**20  # of address space, of which the interpreter takes some 20 MiB
OUTPUT_BYTES = 64  # a token and a little: whatever is longer is none
INDENT = " " * 4
FENCED = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
KEYS = ("prompt", "test", "entry_point")


def check_unit_tests(
    responses: Sequence[str], answers: Sequence[str], timeout_s: float = TIMEOUT_S
) -> list[bool]:
    """Whether each response passes its answer's test, each in a container of its own.

    An answer is JSON with HumanEval's `prompt`, `test` and `entry_point`. A response goes on where
    the prompt ends, or is the whole function; either may be fenced as Markdown.

    Raises:
        DataError: an answer is not such JSON, or containers do not work here.
    """
    require_sandbox()
    jobs = [_job(*pair) for pair in zip(responses, answers, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda job: _passes(job, timeout_s), jobs))


def is_code(response: str) -> bool:
    """Whether a response is Python at all, a whole function or the rest of one, right or wrong."""
    code = _code(response, "")
    bodies = [code, f"def f():\n{code}", f"def f():\n{textwrap.indent(code, INDENT)}"]
    return bool(code.strip()) and any(map(_compiles, bodies))


def _compiles(program: str) -> bool:
    try:
        compile(program, "<response>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # a null byte is a ValueError
        return False
    return True


def _job(response: str, answer: str) -> dict[str, object]:
    try:
        problem = json.loads(answer)
        prompt, test, entry_point = (str(problem[key]) for key in KEYS)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"checker unit-tests: an answer must be JSON with {', '.join(KEYS)}: {error}"
        ) from error
    return {
        "programs": _programs(_code(response, entry_point), prompt, entry_point),
        "test": test,
        "entry_point": entry_point,
        "cpu_s": CPU_S,
        "memory_bytes": MEMORY_BYTES,
    }


def _code(response: str, entry_point: str) -> str:
    """The fenced part that defines the function, else the first one, else the whole response."""
    blocks = [block[1] for block in FENCED.finditer(response)]
    whole = [block for block in blocks if _definition(block, entry_point)]
    return [*whole, *blocks, response][0]


def _definition(code: str, entry_point: str) -> re.Match[str] | None:
    return re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE)


def _programs(code: str, prompt: str, entry_point: str) -> list[str]:
    """What a response may mean, the likeliest first: of a body, the indentation may be lost."""
    bodies = [code, INDENT + code, textwrap.indent(code, INDENT)]
    programs = [prompt + body for body in bodies]
    start = _definition(prompt, entry_point)
    if start and _definition(code, entry_point):
        # Imports and helpers that the prompt gives before the function.
        return [f"{prompt[: start.start()]}\n{code}", *programs]
    return programs


def _passes(job: dict[str, object], timeout_s: float) -> bool:
    token = secrets.token_hex(16)
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps(job | {"token": token}).encode())
        stdin.seek(0)
        reader, writer = os.pipe()
        try:
            process = start(SANDBOX, stdin, writer, stderr)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            began = _first_output(reader, len(BEGAN), START_S) == BEGAN
            passed = began and _first_output(reader, OUTPUT_BYTES, timeout_s) == token.encode()
        finally:
            os.close(reader)
            # Before the wait: until then its number is no other process's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not began:
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip()
            raise DataError(f"a sandbox for a generated program did not start: {said}")
        return passed


def _first_output(reader: int, at_most: int, timeout_s: float) -> bytes:
    """The first that a process writes: nothing when it ends, or time does, before that."""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        return os.read(reader, at_most) if selector.select(timeout_s) else b""
