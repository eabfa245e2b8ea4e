"""What a person sees: a live table on a terminal, a line for each finished cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from evals.state_tracking.suites import Cell
from evals.state_tracking.summary import Run

SHOWN = 12  # finished cells in the live table


class LiveTable:
    """Running cells with their step and validation, the last finished ones with their result."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began = time.monotonic()
        self.total = self.finished = 0
        self.running: dict[str, tuple[Cell, dict[str, Any]]] = {}
        self.ended: list[tuple[str, str]] = []
        self.live = Live(console=console, get_renderable=self._table) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def plan(self, cells: Iterable[Cell]) -> None:
        """More cells are to be done."""
        self.total += len(list(cells))

    def progress(self, cell: Cell, message: dict[str, Any]) -> None:
        self.running[cell.digest] = (cell, message)

    def done(self, cell: Cell, run: Run, kept: bool) -> None:
        length = max(run.curve)
        text = (
            f"{run.final:6.3f} at {length}, {run.validation_accuracy:6.3f} at "
            f"{cell.training.validation_length} (validation), {run.row['value']:.0f} s"
        )
        self._end(cell, f"{text}{', kept from commit ' + run.row['commit'] if kept else ''}")

    def failed(self, cell: Cell, reason: str) -> None:
        self._end(cell, f"failed: {reason}")

    def _end(self, cell: Cell, text: str) -> None:
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
        table.add_column("scaled accuracy")
        for name, text in self.ended[-SHOWN:]:
            table.add_row(name, text)
        for cell, message in list(self.running.values()):
            step = f"step {message['step']} of {message['steps']}"
            so_far = f"{step}: accuracy {message['validation']:.3f} (validation), loss {message['loss']:.3f}"
            table.add_row(f"{cell.name} seed {cell.seed}", so_far)
        return table
