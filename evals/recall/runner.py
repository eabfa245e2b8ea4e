"""The cells of a suite as a sweep, and the rows of a finished one."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import msgspec

from evals.recall.cell import Outcome, build_model, check_examples
from evals.recall.data import make
from evals.recall.model import RecallModel
from evals.recall.suites import Cell
from evals.recall.summary import Run, collect
from evals.results import Results
from evals.sweep import Display, Sweep, Usage

COMMAND = (sys.executable, "-m", "evals.recall.cell")


def run(
    cells: list[Cell], results: Results, jobs: int, display: Display[Cell, Run], gpus: int = 0
) -> tuple[list[Run], bool, Usage]:
    """All cells: their runs, whether all finished, and the use of the cores.

    Raises:
        ValueError: before anything is trained, what a layer or a generator refuses.
    """
    check(cells)
    # The longest first, so that the last one does not keep a core alone for long; then one seed of everything.
    cells = sorted(cells, key=lambda cell: (-(cell.training.seconds or math.inf), cell.seed))
    sweep = Sweep(
        COMMAND, results, jobs, display,
        write=lambda rows, cell, outcome: write_rows(rows, cell, Outcome(**outcome)),
        collect=collect,
        about=lambda cell: {"plan": cell.plan, "arm": cell.arm},
        environment=(lambda slot: one_gpu(slot, gpus)) if gpus else lambda slot: {},
    )  # fmt: skip
    display.plan(cells)
    found = sweep.run(cells)
    if sweep.usage.wall:
        config = {**sweep.usage._asdict(), "filled": sweep.usage.filled, "load": os.getloadavg()[0]}
        results.write(f"{cells[0].suite}/sweep", "core_use", sweep.usage.share, "of the cores given", config=config)
    # A kept run is judged by today's protocol, whatever controls it had when it was made.
    controls = {cell.digest: cell.control for cell in cells}
    runs = [
        run._replace(about={**run.about, "cell": {**run.cell, "control": controls[digest]}})
        for digest, run in found.items()
    ]
    return runs, len(found) == len(cells), sweep.usage


def one_gpu(slot: int, gpus: int) -> dict[str, str]:
    """The environment in which the process of ``slot`` sees one of the ``gpus`` that this process sees."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": names[slot % gpus]}


def check(cells: list[Cell]) -> None:
    """Refuses what a layer or a generator would refuse, each distinct one once and without memory."""
    models: dict[tuple[str, ...], RecallModel] = {}
    seen: set[tuple[str, ...]] = set()
    for cell in cells:
        key = (cell.pattern, str(cell.layers), str(cell.d_model), cell.plan, cell.reads)
        if key not in models:
            models[key] = build_model(cell, device="meta")
        model = models[key]
        data = (cell.task, str(cell.train), str(cell.test), cell.reads, str(model.reads_prefix))
        if data not in seen:
            seen.add(data)
            for one in cell.train:
                check_examples(cell, model, make(cell, msgspec.structs.replace(one, count=1), "train", (0,)))
            for one in cell.test:
                check_examples(cell, model, make(cell, msgspec.structs.replace(one, count=1), "test", (0,)))


def write_rows(results: Results, cell: Cell, outcome: Outcome) -> list[dict[str, Any]]:
    """Each test set's accuracy, state and speed, and at last the score with all that repeats the cell."""
    about = {
        "suite": cell.suite, "plan": cell.plan, "arm": cell.arm, "point": cell.point, "choice": cell.choice,
        "digest": cell.digest, "parameters": outcome.parameters,
    }  # fmt: skip
    who = {"layer": cell.layer, "backend": "auto", "seed": cell.seed}
    rows = [
        results.write(f"{cell.name}/{label}", "accuracy", value, "", **who, config={**about, "test": label})
        for label, value in outcome.test.items()
    ]
    state = {**about, "context_length": cell.state_context, "mixer_bytes": outcome.mixer_bytes}
    rows.append(results.write(cell.name, "state_bytes", outcome.state_bytes, "bytes", **who, config=state))
    speed = {
        **about,
        "clock": "processor of one thread" if cell.device == "cpu" else "wall",
        "load": os.getloadavg()[0],
    }
    rows.append(
        results.write(cell.name, "tokens_per_second", outcome.tokens_per_second, "tokens/s", **who, config=speed)
    )
    everything = {
        **about, "ended": outcome.ended, "epochs": outcome.epochs, "steps": outcome.steps, "loss": outcome.loss,
        "history": outcome.history, "train_seconds": outcome.train_seconds, "seconds": outcome.seconds,
        "data_digest": outcome.digest, "published": cell.published, "cell": msgspec.to_builtins(cell),
    }  # fmt: skip
    rows.append(results.write(cell.name, "score", outcome.score, "", **who, config=everything))
    return rows
