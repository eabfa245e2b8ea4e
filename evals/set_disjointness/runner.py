"""Runs a suite's cells and writes their rows."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console

from evals.results import Results
from evals.set_disjointness.cell import build_model
from evals.set_disjointness.suites import Cell
from evals.set_disjointness.summary import ORDERS, Run, collect
from evals.sweep import Sweep
from evals.sweep_display import SweepTable

COMMAND = (sys.executable, "-m", "evals.set_disjointness.cell")


class Table(SweepTable[Cell, Run]):
    """The loss while a cell trains, accuracy in both orders when it has finished."""

    measure = "accuracy"

    def result(self, cell: Cell, run: Run) -> str:
        orders = ", ".join(f"{order} {run.order(order):.3f}" for order in ORDERS)
        return f"{orders}, {run.row['value']:.0f} s"

    def so_far(self, cell: Cell, message: dict[str, Any]) -> str:
        return f"step {message['step']} of {message['steps']}: loss {message['loss']:.3f}"

    def commit(self, run: Run) -> str:
        return run.row["commit"]


def run(cells: list[Cell], results: Results, jobs: int, console: Console) -> tuple[list[Run], bool]:
    """The finished runs, and whether all cells finished.

    Raises:
        ValueError: before anything is trained, arguments that a layer refuses.
    """
    for cell in cells:
        build_model(cell, device="meta")
    with Table(console) as display:
        sweep = Sweep(
            COMMAND, results, jobs, display, write=write_rows, collect=collect, about=lambda cell: {"arm": cell.arm}
        )
        display.plan(cells)
        found = sweep.run(cells)
    return list(found.values()), len(found) == len(cells)


def write_rows(results: Results, cell: Cell, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy at every test size, and at last the time with all that repeats the cell."""
    about = {
        "suite": cell.suite, "arm": cell.arm, "digest": cell.digest, "parameters": outcome["parameters"],
        "state_elements": outcome["state_elements"],
    }  # fmt: skip
    who = {"layer": cell.layer, "backend": "auto", "seed": cell.seed}
    rows = []
    for sizes, value in outcome["accuracy"].items():
        config = {**about, "sizes": [int(size) for size in sizes.split("-")], "examples": cell.plan.test_count}
        rows.append(results.write(f"{cell.name}/{sizes}", "accuracy", value, "", **who, config=config))
    rows.append(results.write(cell.name, "training_loss", outcome["loss"], "nats", **who, config=about))
    everything = {**about, "cell": msgspec.to_builtins(cell)}
    rows.append(results.write(cell.name, "run_time", outcome["seconds"], "s", **who, config=everything))
    return rows
