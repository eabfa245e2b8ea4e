"""Rows into runs, and runs into shares of the gap and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from evals.results import latest

SUITE = "conversion"
ARMS = ("hedgehog", "hedgehog_window")  # what is judged
NEEDED = 0.95
# Softmax kept runs the same operations on the same numbers; its mean is a sum of float64 terms.
SAME = 1e-9


class Run(NamedTuple):
    """A finished cell.

    Attributes:
        row: its last row, with all that repeats it.
        losses: held-out nats a byte by stage.
        fidelity: stage, layer and metric to value.
        distillation: (``first`` or ``last``, layer) to (step, loss).
    """

    row: Mapping[str, Any]
    losses: dict[str, float]
    fidelity: dict[tuple[str, int, str], float]
    distillation: dict[tuple[str, int], tuple[int, float]]

    @property
    def arm(self) -> str:
        return self.row["config"]["arm"]

    @property
    def seed(self) -> int:
        return self.row["seed"]

    @property
    def final(self) -> float:
        """Held-out loss after the last stage that there was."""
        return next(self.losses[stage] for stage in ("finetuned", "distilled", "swapped") if stage in self.losses)


class Share(NamedTuple):
    """What a conversion recovered of the loss that swapping cost.

    Attributes:
        of_teacher: against the teacher as it was.
        of_longer: against the teacher after the same fine-tuning; None when that did not run.
    """

    seed: int
    teacher: float
    run: Run
    longer: float | None

    @property
    def of_teacher(self) -> float:
        return self._share(self.teacher)

    @property
    def of_longer(self) -> float | None:
        return None if self.longer is None else self._share(self.longer)

    def _share(self, goal: float) -> float:
        swapped = self.run.losses["swapped"]
        return (swapped - self.run.final) / (swapped - goal)


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Run]:
    """Finished runs by digest."""
    by_digest: dict[str, list[dict[str, Any]]] = {}
    for row in latest(row for row in rows if row["suite"] == SUITE and row["metric"] != "failed"):
        by_digest.setdefault(row["config"]["digest"], []).append(row)
    runs = {}
    for digest, mine in by_digest.items():
        last = [row for row in mine if row["metric"] == "run_time"]
        if not last:
            continue
        losses = {row["config"]["stage"]: row["value"] for row in mine if row["metric"] == "loss"}
        fidelity = {
            (row["config"]["stage"], row["config"]["model_layer"], row["metric"]): row["value"]
            for row in mine
            if "model_layer" in row["config"] and "stage" in row["config"]
        }
        distillation = {
            (row["case"].split("/")[-2], row["config"]["model_layer"]): (row["config"]["step"], row["value"])
            for row in mine
            if row["metric"] == "distillation_loss"
        }
        runs[digest] = Run(last[-1], losses, fidelity, distillation)
    return runs


def shares(runs: Iterable[Run], arm: str) -> list[Share]:
    """One a seed, in order."""
    runs = list(runs)
    longer = {run.seed: run.final for run in runs if run.arm == "teacher trained on"}
    mine = sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)
    return [Share(run.seed, run.losses["teacher"], run, longer.get(run.seed)) for run in mine]


def judge(runs: Iterable[Run]) -> Iterator[tuple[str, bool]]:
    """Claims and whether they hold."""
    runs = list(runs)
    for arm in ARMS:
        found = shares(runs, arm)
        text = ", ".join(f"{share.of_teacher:.1%}" for share in found) or "nothing measured"
        yield (
            f"{arm} recovers at least {NEEDED:.0%} of the loss that swapping cost, for every seed: {text}",
            bool(found) and all(share.of_teacher >= NEEDED for share in found),
        )
    kept = [run for run in runs if run.arm == "softmax kept"]
    yield (
        "softmax kept through the swap has the teacher's loss: "
        + ", ".join(f"{run.losses['swapped'] - run.losses['teacher']:+.1e}" for run in kept),
        bool(kept) and all(abs(run.losses["swapped"] - run.losses["teacher"]) <= SAME for run in kept),
    )
    trained = {(run.seed, run.arm): run.final for run in runs if run.arm in ARMS}
    relu = [run for run in runs if run.arm == "relu, untrained"]
    yield (
        "relu features without training are worse than every conversion of the same teacher: "
        + ", ".join(f"{run.final:.3f}" for run in relu),
        bool(relu) and all(run.final > trained.get((run.seed, arm), float("inf")) for run in relu for arm in ARMS),
    )
