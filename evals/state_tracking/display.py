"""What a person sees of the state tracking sweep."""

from __future__ import annotations

from typing import Any

from evals.state_tracking.suites import Cell
from evals.state_tracking.summary import Run
from evals.sweep_display import SweepTable


class LiveTable(SweepTable[Cell, Run]):
    """Validation while a cell trains, the longest test when it has finished."""

    measure = "scaled accuracy"

    def result(self, cell: Cell, run: Run) -> str:
        return (
            f"{run.final:6.3f} at {max(run.curve)}, {run.validation_accuracy:6.3f} at "
            f"{cell.training.validation_length} (validation), {run.row['value']:.0f} s"
        )

    def so_far(self, cell: Cell, message: dict[str, Any]) -> str:
        step = f"step {message['step']} of {message['steps']}"
        return f"{step}: accuracy {message['validation']:.3f} (validation), loss {message['loss']:.3f}"

    def commit(self, run: Run) -> str:
        return run.row["commit"]
