"""What a person sees of a sweep: a live table on a terminal, a line for each finished cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Generic

from rich.console import Console
from rich.live import Live
from rich.table import Table

from evals.sweep import C, R

SHOWN = 12  # finished cells in the live table


class SweepTable(Generic[C, R]):
    """Running cells with how far they are, the last finished ones with their result.

    A suite says in a subclass what it shows of a run (:meth:`result`) and of a message (:meth:`so_far`).
    """

    measure = "result"

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began = time.monotonic()
        self.total = self.finished = 0
        self.running: dict[str, tuple[C, dict[str, Any]]] = {}
        self.ended: list[tuple[str, str]] = []
        self.live = Live(console=console, get_renderable=self._table) if console.is_terminal else None

    def result(self, cell: C, run: R) -> str:
        raise NotImplementedError

    def so_far(self, cell: C, message: dict[str, Any]) -> str:
        raise NotImplementedError

    def commit(self, run: R) -> str:
        """Where the rows of a kept run were made."""
        raise NotImplementedError

    def __enter__(self) -> SweepTable[C, R]:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def plan(self, cells: Sequence[C]) -> None:
        """More cells are to be done."""
        self.total += len(cells)

    def progress(self, cell: C, message: dict[str, Any]) -> None:
        self.running[cell.digest] = (cell, message)

    def done(self, cell: C, run: R, kept: bool) -> None:
        self._end(cell, f"{self.result(cell, run)}{', kept from commit ' + self.commit(run) if kept else ''}")

    def failed(self, cell: C, reason: str) -> None:
        self._end(cell, f"failed: {reason}")

    def _end(self, cell: C, text: str) -> None:
        self.running.pop(cell.digest, None)
        self.finished += 1
        name = f"{cell.name} seed {cell.seed}"
        self.ended.append((name, text))
        if self.live is None:
            line = f"[{self.finished}/{self.total}] {time.monotonic() - self.began:5.0f} s  {name}: {text}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=f"{self.finished} of {self.total} cells, {time.monotonic() - self.began:.0f} s")
        table.add_column("cell")
        table.add_column(self.measure)
        for name, text in self.ended[-SHOWN:]:
            table.add_row(name, text)
        for cell, message in list(self.running.values()):
            table.add_row(f"{cell.name} seed {cell.seed}", self.so_far(cell, message))
        return table
