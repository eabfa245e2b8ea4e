"""From rows to runs, and whether the controls hold."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from evals.results import latest

SUITE = "hydra"
SOLVED = 0.9
CONTROLLED = "cpu"  # the suite whose controls mean something: smoke trains for three steps


class Run(NamedTuple):
    """One finished cell: its last row, and (metric, part) to row."""

    study: str
    arm: str
    seed: int
    rows: dict[tuple[str, str | None], Mapping[str, Any]]
    last: Mapping[str, Any]

    def value(self, metric: str, part: str | None = None) -> float:
        return self.rows[metric, part]["value"]

    def named(self, metric: str) -> dict[str, Mapping[str, Any]]:
        """Rows of a metric by part."""
        return {part or "": row for (name, part), row in self.rows.items() if name == metric}


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Run]:
    """Finished runs by their cell's digest; a run is finished when its last row (``run_time``) is there."""
    own = [row for row in rows if row["suite"] == SUITE and row["value"] is not None]
    by_digest: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in latest(own):
        by_digest[row["config"]["digest"]].append(row)
    runs = {}
    for digest, found in by_digest.items():
        one: dict[tuple[str, str | None], Mapping[str, Any]] = {
            (row["metric"], row["config"].get("part")): row for row in found
        }
        last = one.pop(("run_time", None), None)
        if last is not None:
            about = last["config"]
            runs[digest] = Run(about["study"], about["arm"], last["seed"], one, last)
    return runs


def arms(runs: Collection[Run], study: str) -> dict[str, list[Run]]:
    """The runs of a study by arm, seeds in order."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        if run.study == study:
            found[run.arm].append(run)
    return dict(found)


def judge(runs: Collection[Run]) -> list[tuple[str, bool]]:
    """What each control says, and whether it holds.

    Nothing but the workspace reaches the value when the other path is a convolution: with it every seed must answer,
    without it accuracy over all seeds must be within four standard errors of chance. Switching a product-key memory
    off must cost more accuracy, in every seed, than four standard errors of a difference of such shares.
    """
    verdicts = []
    runs = [run for run in runs if run.last["config"]["suite"] == CONTROLLED]
    memory = arms(runs, "memory")
    for run in memory.get("gated_conv/workspace on", []):
        accuracy = run.value("accuracy")
        text = f"workspace, seed {run.seed}: accuracy {accuracy:.3f} beyond the window; at least {SOLVED}"
        verdicts.append((text, accuracy >= SOLVED))
    blind = memory.get("gated_conv/workspace off", [])
    if blind:
        chance = blind[0].rows["accuracy", None]["config"]["chance"]
        asked = sum(run.last["config"]["cell"]["options"]["rows"] for run in blind)
        mean = statistics.mean(run.value("accuracy") for run in blind)
        bound = chance + 4 * math.sqrt(chance * (1 - chance) / asked)
        verdicts.append((f"convolutions without a workspace: accuracy {mean:.3f}; at most {bound:.3f}", mean <= bound))
    for run in arms(runs, "facts").get("memory on", []):
        kept, ablated = run.value("accuracy"), run.value("accuracy_ablated")
        count = run.rows["accuracy", None]["config"]["facts"]
        bound = kept - 4 * math.sqrt(2 * 0.25 / count)
        text = f"facts, seed {run.seed}: accuracy {kept:.3f} with the memory, {ablated:.3f} without; below {bound:.3f}"
        verdicts.append((text, ablated < bound))
    return verdicts
