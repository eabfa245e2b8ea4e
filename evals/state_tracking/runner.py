"""The grid of every arm, then more seeds where it did best; the rows of a finished cell."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from evals.results import Results
from evals.state_tracking.cell import Outcome, build_model
from evals.state_tracking.suites import Cell, Suite, grid_cells, more_seeds
from evals.state_tracking.summary import Run, collect
from evals.sweep import Display, Sweep
from seqmodels.tasks.state_tracking import scaled_accuracy, task_named

COMMAND = (sys.executable, "-m", "evals.state_tracking.cell")


def run(name: str, suite: Suite, results: Results, jobs: int, display: Display[Cell, Run]) -> tuple[list[Run], bool]:
    """The grid of every arm, then more seeds at each arm's chosen point: the runs, and whether all finished.

    Raises:
        ValueError: before anything is trained, arguments that a layer refuses.
    """
    pool = Sweep(
        COMMAND, results, jobs, display,
        write=lambda rows, cell, outcome: write_rows(rows, cell, _outcome(outcome)),
        collect=collect,
        about=lambda cell: {"task": cell.task, "arm": cell.arm},
    )  # fmt: skip
    cells = grid_cells(name, suite)
    for cell in cells:
        build_model(cell, device="meta")
    display.plan(cells)
    found = pool.run(cells)
    later = []
    for task, plan in suite.tasks.items():
        for arm in suite.arms:
            searched = [cell for cell in cells if (cell.task, cell.arm) == (task, arm)]
            finished = [cell for cell in searched if cell.digest in found]
            if finished:
                chosen = max(finished, key=lambda cell: found[cell.digest].rank)
                later += more_seeds(chosen, plan.grid, searched)
    display.plan(later)
    found |= pool.run(later)
    return list(found.values()), len(found) == len(cells) + len(later)


def write_rows(results: Results, cell: Cell, outcome: Outcome) -> list[dict[str, Any]]:
    """Scaled accuracy at every test length, the validation, and at last the time with all that repeats the cell."""
    rows = []
    chance = task_named(cell.task).chance
    about = {
        "suite": cell.suite, "task": cell.task, "arm": cell.arm, "point": cell.point, "digest": cell.digest,
        "parameters": outcome.parameters, "trained_length": max(stage.max_length for stage in cell.training.stages),
        "published": cell.published, "control": cell.control,
    }  # fmt: skip
    who = {"layer": cell.layer, "backend": "auto", "seed": cell.seed}
    for length, (right, asked) in outcome.test.items():
        value = scaled_accuracy(right / asked, chance)
        config = {**about, "length": length, "answers": asked, "accuracy": right / asked}
        rows.append(results.write(f"{cell.name}/L{length}", "scaled_accuracy", value, "", **who, config=config))
    for metric, value in (
        ("validation_accuracy", scaled_accuracy(outcome.validation_accuracy, chance)),
        ("validation_loss", outcome.validation_loss),
    ):
        config = {**about, "length": cell.training.validation_length, "step": outcome.step}
        unit = "nats" if metric == "validation_loss" else ""
        rows.append(results.write(cell.name, metric, value, unit, **who, config=config))
    everything = {**about, "cell": msgspec.to_builtins(cell)}
    rows.append(results.write(cell.name, "run_time", outcome.seconds, "s", **who, config=everything))
    return rows


def _outcome(found: dict[str, Any]) -> Outcome:
    """From the JSON of a cell's process, whose keys are strings."""
    return Outcome(**{**found, "test": {int(length): tuple(counts) for length, counts in found["test"].items()}})
