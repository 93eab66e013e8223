"""The workers on a terminal: a table that stays current; elsewhere a line for every change."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qsun.progress import announce
from qsun.serve.pool import Pool, State

COLUMNS = ("worker", "role", "tasks", "state", "in flight", "KV reserved", "")
STYLES = {State.READY: "green", State.JOINING: "yellow", State.DOWN: "red", State.DRAINING: "cyan"}


class WorkerTable:
    """What is shown of a pool, on stderr."""

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._said: dict[str, tuple[State, str]] = {}
        console = Console(stderr=True)
        self._live = (
            Live(console=console, get_renderable=self.render, refresh_per_second=2)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> WorkerTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def changed(self, pool: Pool) -> None:
        """Show what has changed; called whenever a worker's state does."""
        self._pool = pool
        if self._live is not None:
            return
        for worker in pool:
            said = worker.state, worker.problem
            if self._said.get(worker.name) != said:
                self._said[worker.name] = said
                about = f" ({worker.problem})" if worker.problem else ""
                announce(f"worker {worker.name}: {worker.state.value}{about}")
        for name in self._said.keys() - {worker.name for worker in pool}:
            del self._said[name]
            announce(f"worker {name}: gone")

    def render(self) -> Table:
        """The table as it is now."""
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for worker in self._pool or ():
            reserved = worker.reserved_blocks / max(worker.blocks, 1)
            decodes = worker.address.role == "decode"
            table.add_row(
                worker.name,
                worker.address.role,
                "all" if decodes else ", ".join(sorted(worker.address.tasks)),
                f"[{STYLES[worker.state]}]{worker.state.value}[/]",
                str(worker.in_flight),
                f"{reserved:.0%}" if decodes else "",
                worker.problem[:60],
            )
        return table
