"""From rows to runs, from runs to points of the figure, and whether the controls hold."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from evals.results import latest

SUITE = "set_disjointness"
SOLVED = 0.95  # accuracy of attention, the control whose state holds everything
SMALL_FIRST, LARGE_FIRST = "|A| < |B|", "|A| > |B|"
ORDERS = (SMALL_FIRST, LARGE_FIRST)


class Run(NamedTuple):
    """One finished cell; ``accuracy`` is (|A|, |B|) to the share of right answers."""

    about: Mapping[str, Any]
    seed: int
    accuracy: dict[tuple[int, int], float]
    row: Mapping[str, Any]

    def order(self, order: str) -> float:
        """Mean accuracy over the test sizes of one order."""
        return statistics.fmean(value for (a, b), value in self.accuracy.items() if (a < b) == (order == SMALL_FIRST))

    @property
    def gap(self) -> float:
        """What the order costs: the better order's accuracy less the other's."""
        return abs(self.order(SMALL_FIRST) - self.order(LARGE_FIRST))

    @property
    def worse(self) -> float:
        """Accuracy in the order that the model finds harder."""
        return min(self.order(order) for order in ORDERS)


class Point(NamedTuple):
    """One model size of an arm at its best learning rate; a run for each seed."""

    suite: str
    arm: str
    d_model: int
    feature_dim: int
    state_elements: int
    runs: list[Run]

    def mean(self, quantity: str) -> float:
        """Over seeds, of "gap", "worse" or one of :data:`ORDERS`."""
        return statistics.fmean(
            run.order(quantity) if quantity in ORDERS else getattr(run, quantity) for run in self.runs
        )


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Run]:
    """Finished runs by their cell's digest; a run is finished when its last row (``run_time``) is there."""
    by_digest: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in latest(row for row in rows if row["suite"] == SUITE and row["value"] is not None):
        by_digest[row["config"]["digest"]].append(row)
    runs = {}
    for digest, found in by_digest.items():
        ends = [row for row in found if row["metric"] == "run_time"]
        if ends:
            accuracy = {tuple(row["config"]["sizes"]): row["value"] for row in found if row["metric"] == "accuracy"}
            runs[digest] = Run(ends[0]["config"], ends[0]["seed"], accuracy, ends[0])
    return runs


def points(runs: Collection[Run]) -> list[Point]:
    """By suite, arm and state size; of an arm's plans under one name, the one that ran last.

    The learning rate of a point is the one with the best mean over its seeds and test sizes, as published.
    """
    newest = {(run.about["suite"], run.about["arm"]): run for run in sorted(runs, key=lambda run: run.row["time"])}
    groups: dict[tuple[Any, ...], dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cell = run.about["cell"]
        if _protocol(cell) == _protocol(newest[cell["suite"], cell["arm"]].about["cell"]):
            key = (cell["suite"], cell["arm"], cell["d_model"], cell["feature_dim"], run.about["state_elements"])
            groups[key][cell["plan"]["learning_rate"]].append(run)
    found = []
    for key, by_rate in groups.items():
        chosen = max(by_rate.values(), key=lambda group: statistics.fmean(_overall(run) for run in group))
        found.append(Point(*key, sorted(chosen, key=lambda run: run.seed)))
    return sorted(found, key=lambda point: (point.suite, point.arm, point.state_elements, point.d_model))


def judge(found: Collection[Point]) -> list[tuple[str, bool]]:
    """What each control says, and whether it holds; a control that has no runs is left out."""
    verdicts = []
    for suite in sorted({point.suite for point in found}):
        arms = {
            arm: [point for point in found if (point.suite, point.arm) == (suite, arm)]
            for arm in ("attention", "causal", "prefix")
        }
        if arms["attention"]:
            lowest = min(point.mean("worse") for point in arms["attention"])
            text = f"{suite}: attention in its harder order {lowest:.3f}; at least {SOLVED} expected"
            verdicts.append((text, lowest >= SOLVED))
        if arms["causal"] and arms["prefix"]:
            gap, worse = (
                {arm: statistics.fmean(point.mean(quantity) for point in arms[arm]) for arm in ("causal", "prefix")}
                for quantity in ("gap", "worse")
            )
            verdicts.append(
                (
                    f"{suite}: the order costs the prefix model {gap['prefix']:.3f} and the causal one "
                    f"{gap['causal']:.3f} on average over state sizes; less expected",
                    gap["prefix"] < gap["causal"],
                )
            )
            verdicts.append(
                (
                    f"{suite}: in the harder order the prefix model has {worse['prefix']:.3f}, the causal one "
                    f"{worse['causal']:.3f} at the same state sizes; more expected",
                    worse["prefix"] > worse["causal"],
                )
            )
    return verdicts


def _overall(run: Run) -> float:
    return statistics.fmean(run.accuracy.values())


def _protocol(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs must share to be compared."""
    plan = {key: value for key, value in cell["plan"].items() if key != "learning_rate"}
    return plan, cell["pairs"], cell["mlp_expansion"], cell["embedding_std"]
