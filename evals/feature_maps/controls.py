"""Whether the maps stand in the order that is known of them; judged on rows alone, for each seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from evals.feature_maps.cells import EXPONENTIAL, SEEDS, SOFTMAX
from evals.feature_maps.measures import uniform_entropy
from evals.feature_maps.recipe import LENGTH

UNIFORM = uniform_entropy(LENGTH)
# Entropy on noise, 128 tokens of width 64, in nats.
KNOWN_ON_NOISE = {SOFTMAX: 4.37, "hedgehog_exp": 4.84, "elu": 4.85}
# Half of the last known digit, and three standard errors: a row's entropy spreads by 0.13, and 128 x 4 are averaged.
KNOWN_TO = 0.005 + 3 * 0.13 / math.sqrt(512)


def judge(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """(what is claimed, whether it holds for every seed); a claim without its rows does not hold."""
    found = {
        (row["config"]["inputs"], row["config"]["map"], row["config"]["stage"], row["metric"], row["seed"]): row[
            "value"
        ]
        for row in rows
    }

    def value(inputs: str, name: str, stage: str, metric: str, seed: int) -> float:
        return found.get((inputs, name, stage, metric, seed), math.nan)

    def trained(name: str, metric: str, seed: int) -> float:
        return value("tokens", name, "distilled", metric, seed)

    def fixed(name: str, metric: str, seed: int) -> float:
        return value("tokens", name, "untrained", metric, seed)

    def best(seed: int) -> float:
        return min(trained("hedgehog_exp", "divergence", seed), trained("hedgehog_joint", "divergence", seed))

    def halfway(seed: int) -> float:
        return (fixed(SOFTMAX, "entropy", seed) + UNIFORM) / 2

    claims = [
        ("distilled Hedgehog (exp or joint) is within 0.25 nats of the softmax", lambda s: best(s) < 0.25),
        ("and at less than half of T2R's distance", lambda s: best(s) < 0.5 * trained("t2r", "divergence", s)),
        (
            "distilled Hedgehog (exp) is spiky: less than a quarter of the way from the softmax's entropy to ln n",
            lambda s: (
                trained("hedgehog_exp", "entropy", s)
                < fixed(SOFTMAX, "entropy", s) + (UNIFORM - fixed(SOFTMAX, "entropy", s)) / 4
            ),
        ),
        ("control: elu is not spiky (95 % of ln n)", lambda s: fixed("elu", "entropy", s) > 0.95 * UNIFORM),
        ("control: exp(2x) is spiky", lambda s: fixed(EXPONENTIAL, "entropy", s) < halfway(s)),
        (
            "control: exp(2x) is less monotone than elu, and than distilled Hedgehog by 0.1",
            lambda s: (
                fixed(EXPONENTIAL, "monotonicity", s)
                < min(fixed("elu", "monotonicity", s), trained("hedgehog_exp", "monotonicity", s) - 0.1)
            ),
        ),
        *(
            (
                f"{name} on noise has the known entropy, {known}",
                lambda s, name=name, known=known: (
                    abs(value("noise", name, "untrained", "entropy", s) - known) < KNOWN_TO
                ),
            )
            for name, known in KNOWN_ON_NOISE.items()
        ),
    ]
    return [(text, all(claim(seed) for seed in SEEDS)) for text, claim in claims]
