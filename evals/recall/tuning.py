"""The search for a suite's stored learning rates: its own cells, over several rates, on examples that it never sees."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from evals.recall.suites import TUNING_SEED, TUNING_SUFFIX, Cell, Grid, Suite, grid_cells


def tuning_cells(name: str, suite: Suite, rates: Sequence[float]) -> list[Cell]:
    """Every arm and task of ``suite`` at each of ``rates``, with one seed that no suite measures.

    The seed draws another start, other training examples and another test set than the suite's, and the runs carry
    the name NAME_rates, so that a page keeps them apart.

    Raises:
        ValueError: a rate that is not above 0.
    """
    for rate in rates:
        if not rate > 0:
            raise ValueError(f"learning rate {rate} to try; expected one above 0")

    def over(grid: Grid) -> Grid:
        return msgspec.structs.replace(grid, learning_rate=tuple(rates), seeds=1)

    plans = {
        key: msgspec.structs.replace(plan, grid=over(plan.grid or suite.grid)) for key, plan in suite.tasks.items()
    }
    return [
        msgspec.structs.replace(cell, seed=cell.seed + TUNING_SEED, control=None)
        for cell in grid_cells(name + TUNING_SUFFIX, msgspec.structs.replace(suite, tasks=plans))
    ]
