"""From rows to runs, from runs to what an arm is worth, and whether the controls hold."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from evals.results import latest

SUITE = "state_tracking"
SOLVED, UNSOLVED = 0.95, 0.2  # scaled accuracy at the longest test: controls above the one, below the other

PROTOCOL = ("training", "test_lengths", "test_count", "blocks", "channel", "channel_arguments")


class Run(NamedTuple):
    """One finished cell; ``curve`` is length to scaled accuracy, accuracies are scaled."""

    about: Mapping[str, Any]
    layer: str
    seed: int
    validation_accuracy: float
    validation_loss: float
    curve: dict[int, float]
    row: Mapping[str, Any]

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: validation accuracy, then loss, which goes on falling where every answer is right."""
        return (self.validation_accuracy, -self.validation_loss)

    @property
    def final(self) -> float:
        """At the longest test."""
        return self.curve[max(self.curve)]


class ArmSummary(NamedTuple):
    """One arm on one task; ``chosen`` are the seeds of the grid point that validated best."""

    suite: str
    task: str
    arm: str
    runs: list[Run]
    chosen: list[Run]

    @property
    def median(self) -> float:
        return statistics.median(run.final for run in self.chosen)

    @property
    def best(self) -> float:
        """Of all runs, by the test itself: what tables of best runs report."""
        return max(run.final for run in self.runs)

    @property
    def about(self) -> Mapping[str, Any]:
        return self.chosen[0].about


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Run]:
    """Finished runs by their cell's digest; a run is finished when its last row (``run_time``) is there."""
    own = [row for row in rows if row["suite"] == SUITE and row["value"] is not None]
    by_digest: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in latest(own):
        by_digest[row["config"]["digest"]].append(row)
    runs = {}
    for digest, found in by_digest.items():
        one = {row["metric"]: row for row in found}
        if "run_time" not in one:
            continue
        curve = {row["config"]["length"]: row["value"] for row in found if row["metric"] == "scaled_accuracy"}
        last = one["run_time"]
        runs[digest] = Run(
            last["config"], last["layer"], last["seed"], one["validation_accuracy"]["value"],
            one["validation_loss"]["value"], dict(sorted(curve.items())), last,
        )  # fmt: skip
    return runs


def summarise(runs: Collection[Run]) -> list[ArmSummary]:
    """Arms by suite and task, the best first; of several protocols under one name, the one that ran last."""
    groups: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in _same_protocol(runs):
        groups[run.about["suite"], run.about["task"], run.about["arm"]].append(run)
    summaries = []
    for (suite, task, arm), found in groups.items():
        point = max(found, key=lambda run: run.rank).about["point"]
        chosen = sorted((run for run in found if run.about["point"] == point), key=lambda run: run.seed)
        summaries.append(ArmSummary(suite, task, arm, found, chosen))
    return sorted(summaries, key=lambda summary: (summary.suite, summary.task, -summary.median, summary.arm))


def _same_protocol(runs: Collection[Run]) -> list[Run]:
    """Runs that may be compared: those trained and tested as their suite's and task's newest run."""

    def protocol(run: Run) -> list[Any]:
        return [run.about["cell"][name] for name in PROTOCOL]

    newest = {(run.about["suite"], run.about["task"]): run for run in sorted(runs, key=lambda run: run.row["time"])}
    return [run for run in runs if protocol(run) == protocol(newest[run.about["suite"], run.about["task"]])]


def judge(summaries: Iterable[ArmSummary]) -> list[tuple[str, bool]]:
    """What each control on parity says, and whether it holds.

    "solves": the median over the seeds of the chosen point is at least 0.95. "fails": no run of the
    whole grid is above 0.2.
    """
    verdicts = []
    for summary in summaries:
        control, length = summary.about["control"], max(summary.chosen[0].curve)
        if summary.task != "parity" or control is None:
            continue
        where = f"{summary.suite}/{summary.task}/{summary.arm} at length {length}"
        if control == "solves":
            holds = summary.median >= SOLVED
            text = f"{where}: median {summary.median:.3f} of {len(summary.chosen)} seeds; at least {SOLVED} expected"
        else:
            holds = summary.best <= UNSOLVED
            text = f"{where}: best {summary.best:.3f} of {len(summary.runs)} runs; at most {UNSOLVED} expected"
        verdicts.append((text, holds))
    return verdicts
