"""From rows to runs, from runs to what an arm is worth, and whether the controls hold."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from evals.results import latest

SUITE = "recall"
SOLVED, UNSOLVED = (
    0.95,
    0.25,
)  # controls that must solve a task reach the one; those that must fail stay below the other

# What runs of one plan must share to stand in one table.
PROTOCOL = ("task", "train", "test", "training", "norm")
# What runs of one arm must share to be one arm.
ARM = ("pattern", "layers", "learned_positions", "reads", "state_context")


class Run(NamedTuple):
    """One finished cell."""

    about: Mapping[str, Any]
    layer: str
    seed: int
    score: float
    test: dict[str, float]
    state_bytes: int
    mixer_bytes: int
    tokens_per_second: float
    row: Mapping[str, Any]

    @property
    def cell(self) -> Mapping[str, Any]:
        return self.about["cell"]


class Point(NamedTuple):
    """One arm on one plan at one width and depth: the seeds of the learning rate and decay that scored best."""

    suite: str
    plan: str
    arm: str
    d_model: int
    depth: int
    chosen: list[Run]
    runs: list[Run]

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(run.score for run in self.chosen)

    @property
    def spread(self) -> float:
        """Half the distance from the worst seed to the best."""
        scores = [run.score for run in self.chosen]
        return (max(scores) - min(scores)) / 2

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(run.tokens_per_second for run in self.chosen)

    @property
    def state_bytes(self) -> int:
        return self.chosen[0].state_bytes

    @property
    def about(self) -> Mapping[str, Any]:
        return self.chosen[0].about


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Run]:
    """Finished runs by their cell's digest; a run is finished when its last row (``score``) is there."""
    own = [
        row for row in rows
        if row["suite"] == SUITE and row["value"] is not None and "digest" in row["config"]
    ]  # fmt: skip
    by_digest: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in latest(own):
        by_digest[row["config"]["digest"]].append(row)
    runs = {}
    for digest, found in by_digest.items():
        one = {row["metric"]: row for row in found}
        if "score" not in one:
            continue
        last = one["score"]
        test = {row["config"]["test"]: row["value"] for row in found if row["metric"] == "accuracy"}
        runs[digest] = Run(
            last["config"], last["layer"], last["seed"], last["value"], test, int(one["state_bytes"]["value"]),
            int(one["state_bytes"]["config"]["mixer_bytes"]), one["tokens_per_second"]["value"], last,
        )  # fmt: skip
    return runs


def summarise(runs: Collection[Run]) -> list[Point]:
    """Points by suite and plan, the best first; of several protocols or arms under one name, the one that ran last."""
    groups: dict[tuple[str, str, str, int, int], list[Run]] = defaultdict(list)
    for run in _newest(_newest(runs, ("suite", "plan"), PROTOCOL), ("suite", "plan", "arm"), ARM):
        cell = run.cell
        groups[cell["suite"], cell["plan"], cell["arm"], cell["d_model"], cell["depth"]].append(run)
    points = []
    for key, found in groups.items():
        choices: dict[str, list[Run]] = defaultdict(list)
        for run in found:
            choices[run.about["choice"]].append(run)
        chosen = max(choices.values(), key=lambda some: statistics.fmean(run.score for run in some))
        points.append(Point(*key, sorted(chosen, key=lambda run: run.seed), found))
    return sorted(points, key=lambda point: (point.suite, point.plan, -point.score, point.arm, point.d_model))


def _newest(runs: Collection[Run], name: tuple[str, ...], content: tuple[str, ...]) -> list[Run]:
    """Of the runs that share the fields ``name`` of their cells, those with the ``content`` of the last one."""

    def fields(run: Run, names: tuple[str, ...]) -> list[Any]:
        return [run.cell.get(field) for field in names]

    last = {str(fields(run, name)): fields(run, content) for run in sorted(runs, key=lambda run: run.row["time"])}
    return [run for run in runs if fields(run, content) == last[str(fields(run, name))]]


def judge(points: Iterable[Point]) -> list[tuple[str, bool]]:
    """What each control says, and whether it holds.

    ``solves``: the mean over the seeds is at least 0.95. ``fails``: no run of any learning rate is above 0.25.
    """
    verdicts = []
    for point in points:
        control = point.about["cell"]["control"]
        if control is None:
            continue
        where = f"{point.suite}/{point.plan}/{point.arm} d={point.d_model}"
        if control == "solves":
            seeds = f"{len(point.chosen)} seed{'s' if len(point.chosen) > 1 else ''}"
            text = f"{where}: {point.score:.3f}, mean of {seeds}; at least {SOLVED} expected"
            verdicts.append((text, point.score >= SOLVED))
        else:
            best = max(run.score for run in point.runs)
            text = f"{where}: best {best:.3f} of {len(point.runs)} runs; at most {UNSOLVED} expected"
            verdicts.append((text, best <= UNSOLVED))
    return verdicts
