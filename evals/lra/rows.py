"""From outcomes to rows, and from rows to what the page shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from evals.lra.plans import Run
from evals.lra.training import Outcome
from evals.results import Results, latest

SUITE = "lra"


class Finished(NamedTuple):
    """One finished run, or a baseline (whose ``seed`` is None). Accuracies in %."""

    task: str
    arm: str
    layer: str
    seed: int | None
    test: float
    about: Mapping[str, Any]
    row: Mapping[str, Any]


def write_run(results: Results, run: Run, outcome: Outcome, data: str) -> dict[str, Any]:
    """Accuracy, loss, time and at last the test accuracy with all that repeats the run; the last row."""
    about = {
        "task": run.task, "arm": run.arm, "digest": run.digest, "published": run.published, "role": run.role,
        "epoch": outcome.epoch, "parameters": outcome.parameters, "data": data,
    }  # fmt: skip
    case, who = f"{run.task}/{run.arm}", {"layer": run.layer, "backend": "auto", "seed": run.seed}
    results.write(case, "selection_accuracy", 100 * outcome.selection.accuracy, "%", **who, config=about)
    results.write(case, "test_loss", outcome.test.loss, "nats", **who, config=about)
    results.write(case, "run_time", outcome.seconds, "s", **who, config=about)
    everything = {**about, "run": msgspec.to_builtins(run), "history": outcome.history}
    return results.write(case, "test_accuracy", 100 * outcome.test.accuracy, "%", **who, config=everything)


def write_baselines(results: Results, task: str, found: Mapping[str, float], data: str) -> None:
    for name, value in found.items():
        config = {"task": task, "arm": name, "baseline": True, "data": data}
        results.write(f"{task}/{name}", "test_accuracy", 100 * value, "%", config=config)


def collect(rows: Iterable[Mapping[str, Any]]) -> list[Finished]:
    """The newest of every (task, arm, seed)."""
    own = [
        row for row in rows if row["suite"] == SUITE and row["metric"] == "test_accuracy" and row["value"] is not None
    ]
    newest = {(row["case"], row["seed"]): row for row in latest(own)}
    found = [
        Finished(
            row["config"]["task"], row["config"]["arm"], row["layer"], row["seed"], row["value"], row["config"], row
        )
        for row in newest.values()
    ]
    return sorted(found, key=lambda run: (run.task, run.arm, -1 if run.seed is None else run.seed))
