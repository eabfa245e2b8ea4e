"""What a person sees of the study."""

from __future__ import annotations

from typing import Any

from evals.hydra.suites import Cell
from evals.hydra.summary import Run
from evals.sweep_display import SweepTable


class LiveTable(SweepTable[Cell, Run]):
    """The loss while a cell trains, its numbers when it has finished."""

    measure = "measured"

    def result(self, cell: Cell, run: Run) -> str:
        rows = list(run.rows.items())[:4]
        numbers = ", ".join(f"{part or ''} {metric} {row['value']:.4g}".strip() for (metric, part), row in rows)
        return f"{numbers}, {run.last['value']:.0f} s"

    def so_far(self, cell: Cell, message: dict[str, Any]) -> str:
        loss = f", loss {message['loss']:.3f}" if "loss" in message else ""
        return f"step {message['step']} of {message['steps']}{loss}"

    def commit(self, run: Run) -> str:
        return run.last["commit"]
