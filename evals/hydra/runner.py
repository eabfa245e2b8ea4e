"""Runs a suite's cells and writes their rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from evals.hydra.suites import Cell
from evals.hydra.summary import Run, collect
from evals.results import Results
from evals.sweep import Display, Sweep

COMMAND = (sys.executable, "-m", "evals.hydra.cell")


def run(cells: Sequence[Cell], results: Results, jobs: int, display: Display[Cell, Run]) -> tuple[list[Run], bool]:
    """The finished runs of ``cells``, and whether all finished.

    Throughput goes last and alone: cells beside it would share its caches and memory.
    """
    pool = Sweep(
        COMMAND, results, jobs, display, write=write_rows, collect=collect, about=lambda cell: {"arm": cell.arm}
    )
    alone = Sweep(COMMAND, results, 1, display, write=write_rows, collect=collect, about=lambda cell: {"arm": cell.arm})
    display.plan(cells)
    found = pool.run([cell for cell in cells if cell.study != "throughput"])
    found |= alone.run([cell for cell in cells if cell.study == "throughput"])
    return list(found.values()), len(found) == len(cells)


def write_rows(results: Results, cell: Cell, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a number, and at last the time with all that repeats the cell."""
    about = {"suite": cell.suite, "study": cell.study, "arm": cell.arm, "digest": cell.digest}
    who = {"layer": cell.layer, "backend": "auto", "seed": cell.seed}
    rows = []
    for row in outcome["rows"]:
        case = f"{cell.name}/{row['part']}" if "part" in row else cell.name
        config = {**about, **row.get("about", {}), "part": row.get("part")}
        rows.append(results.write(case, row["metric"], row["value"], row["unit"], **who, config=config))
    everything = {**about, "cell": msgspec.to_builtins(cell)}
    rows.append(results.write(cell.name, "run_time", outcome["seconds"], "s", **who, config=everything))
    return rows
