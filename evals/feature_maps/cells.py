"""What is measured: each map on each kind of input, untrained and distilled, for each seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from evals.feature_maps import measures, recipe
from seqmodels.mixers.feature_maps import FEATURE_MAPS, FeatureMap, LearnedMap

SUITE = "feature_maps"
SEEDS = (0, 1, 2)
HELD_OUT = {"tokens": 32, "noise": 128}  # sequences that are measured and not trained on
SOFTMAX = "softmax"  # the teacher, measured like a map


class Exponential(FeatureMap):
    """phi(x) = exp(2 x), a control: spiky, and not monotone in q . k."""

    epsilon: ClassVar[float] = 1e-30

    def forward(self, x: Tensor) -> Tensor:
        return (2 * self.widened(x)).exp()


EXPONENTIAL = "exp(2x)"
# The identity's weights have either sign: no entropy, no divergence. taylor_full has taylor's weights.
MAPS: dict[str, type[FeatureMap]] = {
    EXPONENTIAL: Exponential,
    **{name: FEATURE_MAPS[name] for name in FEATURE_MAPS.shipped() if name not in ("identity", "taylor_full")},
}
LEARNED = tuple(name for name, kind in MAPS.items() if issubclass(kind, LearnedMap))


class Cell(NamedTuple):
    """``stage`` is "untrained" or "distilled"."""

    inputs: str
    map_name: str
    stage: str
    seed: int

    @property
    def case(self) -> str:
        return f"{self.inputs}/{self.map_name}/{self.stage} seed {self.seed}"


def cells() -> Iterator[Cell]:
    for seed in SEEDS:
        for name in (SOFTMAX, *MAPS):
            yield Cell("noise", name, "untrained", seed)
            yield Cell("tokens", name, "untrained", seed)
            if name in LEARNED:
                yield Cell("tokens", name, "distilled", seed)


def measure(cell: Cell) -> dict[str, float]:
    """Metric to value. On noise the last row alone counts, which sees all 128 tokens: that is what has known values."""
    torch.manual_seed(cell.seed)
    source = recipe.tokens if cell.inputs == "tokens" else recipe.noise
    draw = source(cell.seed)
    q, k = draw(HELD_OUT[cell.inputs])
    teacher = measures.softmax_weights(q, k)
    if cell.map_name == SOFTMAX:
        weights = teacher
    else:
        kind, size = MAPS[cell.map_name], (q.shape[2], q.shape[3])
        pair = recipe.Pair(kind(*size), kind(*size))
        if cell.stage == "distilled":
            recipe.distil(pair, draw)
        with torch.no_grad():
            weights = pair.weights(q, k)
    if cell.inputs == "noise":
        return {"entropy": measures.entropy(weights[..., -1:, :])}
    return {
        "entropy": measures.entropy(weights),
        "monotonicity": measures.monotonicity(q, k, weights),
        "divergence": measures.divergence(teacher, weights),
    }


def config(cell: Cell) -> dict[str, object]:
    """Everything that measures the cell again."""
    found: dict[str, object] = {"inputs": cell.inputs, "map": cell.map_name, "stage": cell.stage}
    if cell.stage == "distilled":
        found |= {"steps": recipe.STEPS, "learning_rate": recipe.LEARNING_RATE, "batch": recipe.BATCH}
    return found
