"""Progress on stderr: a bar with a time estimate on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
_STARTED = time.monotonic()


def announce(step: str) -> None:
    """Say what begins now, and how many seconds the process has run."""
    print(f"[{time.monotonic() - _STARTED:4.0f} s] {step}", file=sys.stderr, flush=True)


@contextmanager
def bar(description: str, total: int) -> Iterator[Any]:
    """A bar that its user advances by `update(1)`."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=f"  {description}",
        leave=not on_terminal,  # in a log, a bar ends as a line of its own
        disable=False,
        file=sys.stderr,
        mininterval=0.2 if on_terminal else 15.0,
        ascii=None if on_terminal else True,
    ) as shown:
        yield shown


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The same items, with a bar over them."""
    with bar(description, total) as shown:
        for item in items:
            yield item
            shown.update(1)
