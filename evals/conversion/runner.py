"""Teachers first, then their conversions, as sweeps; and the rows of a finished cell."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec

from evals.conversion.suites import Cell, cells
from evals.conversion.summary import Run, collect
from evals.results import Results
from evals.sweep import Display, Sweep

COMMAND = (sys.executable, "-m", "evals.conversion.cell")
PICTURED = ("hedgehog", "hedgehog_window")  # of the first seed


def run(suite: str, results: Results, jobs: int, display: Display[Cell, Run]) -> tuple[list[Run], bool]:
    """All cells of ``suite``: their runs, and whether all finished."""
    sweep = Sweep(
        COMMAND, results, jobs, display, write=write_rows, collect=collect, about=lambda cell: {"arm": cell.arm}
    )
    teachers, conversions = cells(suite)
    display.plan([*teachers, *conversions])
    found = sweep.run(teachers)
    trained = {cell.seed for cell in teachers if cell.digest in found}
    found |= sweep.run([cell for cell in conversions if cell.seed in trained])
    return list(found.values()), len(found) == len(teachers) + len(conversions)


def write_rows(results: Results, cell: Cell, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses by stage, fidelity by stage and layer, and at last the time with all that repeats the cell."""
    about = {"suite": cell.suite, "arm": cell.arm, "digest": cell.digest}
    who: dict[str, Any] = {"layer": cell.layer, "backend": "auto", "seed": cell.seed}
    rows = []
    for stage, score in outcome.get("scores", {}).items():
        config = {**about, "stage": stage, "perplexity": score["perplexity"], "tokens": score["tokens"]}
        rows.append(results.write(f"{cell.name}/{stage}", "loss", score["loss"], "nats a byte", **who, config=config))
    for stage, layers in outcome.get("fidelity", {}).items():
        for values in layers:
            layer = int(values["layer"])
            for metric in ("kl", "teacher_entropy", "student_entropy", "spearman"):
                unit = "" if metric == "spearman" else "nats"
                config = {**about, "stage": stage, "model_layer": layer}
                case = f"{cell.name}/{stage}/layer{layer}"
                rows.append(results.write(case, metric, values[metric], unit, **who, config=config))
    history = outcome.get("history", {}).get("1", [])
    for name, row in (("first", history[:1]), ("last", history[-1:])):
        for layer, value in enumerate(row[0]["layers"] if row else []):
            config = {**about, "step": row[0]["step"], "model_layer": layer}
            rows.append(
                results.write(f"{cell.name}/{name}/layer{layer}", "distillation_loss", value, "", **who, config=config)
            )
    everything = {
        **about, "cell": msgspec.to_builtins(cell), "processor": outcome["processor"],
        "parameters": outcome.get("parameters"), "map_parameters": outcome.get("map_parameters"),
        "transformers": outcome.get("transformers"),
    }  # fmt: skip
    picture = Path(outcome["folder"]) / "attention.png"
    if cell.seed == 0 and cell.arm in PICTURED and picture.exists():
        shutil.copy(picture, results.path.parent / f"attention-{cell.arm}.png")
    rows.append(results.write(cell.name, "run_time", outcome["seconds"], "s", **who, config=everything))
    return rows
