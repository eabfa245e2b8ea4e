"""What a person sees while the suite runs."""

from __future__ import annotations

from typing import Any

from evals.conversion.suites import Cell
from evals.conversion.summary import Run
from evals.sweep_display import SweepTable


class LiveTable(SweepTable[Cell, Run]):
    """Losses of finished cells, steps of running ones."""

    measure = "held-out loss (nats a byte)"

    def result(self, cell: Cell, run: Run) -> str:
        stages = ", ".join(f"{stage} {value:.3f}" for stage, value in run.losses.items())
        return f"{stages or 'trained'} ({run.row['value']:.0f} s)"

    def so_far(self, cell: Cell, message: dict[str, Any]) -> str:
        stage = f"stage {message['stage']}, " if "stage" in message else ""
        return f"{stage}step {message['step']} of {message['steps']}, loss {message['loss']:.3f}"

    def commit(self, run: Run) -> str:
        return run.row["commit"]
