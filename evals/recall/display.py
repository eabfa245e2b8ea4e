"""What a person sees of the recall sweep."""

from __future__ import annotations

from typing import Any

from evals.recall.suites import Cell
from evals.recall.summary import Run
from evals.sweep_display import SweepTable


class LiveTable(SweepTable[Cell, Run]):
    """The test score after each epoch, and how a run ended."""

    measure = "accuracy"

    def result(self, cell: Cell, run: Run) -> str:
        return (
            f"{run.score:6.3f}, {run.about['ended']} after {run.about['epochs']} epochs, "
            f"state {run.state_bytes:,} bytes, {run.tokens_per_second:,.0f} tokens/s"
        )

    def so_far(self, cell: Cell, message: dict[str, Any]) -> str:
        return f"epoch {message['epoch']} of {message['epochs']}: {message['score']:.3f}, loss {message['loss']:.3f}"

    def commit(self, run: Run) -> str:
        return run.row["commit"]
