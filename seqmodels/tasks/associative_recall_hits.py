"""Associative-recall hits in text: tokens that a repeated pair predicts, and a model's perplexity on them.

Token i of a context x ends the pair b_i = (x[i-1], x[i]), i >= 1. It is a repeat when b_i occurred before in x. Two
definitions are published::

    zoology  AR hit: a repeat whose pair occurs at most 1250 times in the training data; all tokens i >= 1 are scored
             (arXiv:2312.04927, section 3)
    jrt      AR hit: a repeat, shown over the pair's count in training; only the second half of each context is scored
             (1,024 of 2,048 tokens; arXiv:2407.05483)

Both are also split by the distance to the pair's last occurrence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from seqmodels.configuration import nearest
from seqmodels.tasks.bigrams import pair_keys

ZOOLOGY_THRESHOLD = 1250


class Definition(NamedTuple):
    """``threshold``: of the training count, None for none; ``second_half``: what is scored of a context."""

    threshold: int | None
    second_half: bool


DEFINITIONS = {"zoology": Definition(ZOOLOGY_THRESHOLD, False), "jrt": Definition(None, True)}


def repeat_distances(tokens: np.ndarray) -> np.ndarray:
    """(length - 1,) int64: tokens since the pair that ends at token i = 1, 2, ... ended last; 0 for its first time."""
    keys = pair_keys(tokens)
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    found = np.zeros(len(keys), np.int64)
    found[order[1:][same]] = (order[1:] - order[:-1])[same]
    return found


class Slice(NamedTuple):
    """Tokens and their summed loss in nats."""

    tokens: int = 0
    nats: float = 0.0

    @property
    def loss(self) -> float | None:
        """Mean nats a token; None for no token."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None for no token, infinite where a float cannot hold it."""
        if self.loss is None:
            return None
        return math.exp(self.loss) if self.loss < 709 else math.inf  # exp(709.8) overflows

    def plus(self, tokens: int, nats: float) -> Slice:
        return Slice(self.tokens + tokens, self.nats + nats)


class HitLoss:
    """Sums of loss over slices of tokens, context by context.

    Slices: ``all``, ``hits``, ``other``; ``distance 2^k`` holds hits whose distance is in [2^k, 2^(k+1));
    ``count 10^k`` holds repeats (whatever the threshold) whose training count is in [10^k, 10^(k+1)), ``count 0``
    those unseen in training.

    Args:
        definition: "zoology" or "jrt".
        threshold: instead of the definition's own.
    """

    def __init__(self, definition: str = "zoology", threshold: int | None = None) -> None:
        if definition not in DEFINITIONS:
            known = ", ".join(DEFINITIONS)
            raise ValueError(f"unknown definition {definition!r}.{nearest(definition, DEFINITIONS)} Known: {known}")
        own = DEFINITIONS[definition]
        self.threshold = own.threshold if threshold is None else threshold
        self.second_half = own.second_half
        self.slices: dict[str, Slice] = {"all": Slice(), "hits": Slice(), "other": Slice()}

    def add(self, log_probs: np.ndarray, distances: np.ndarray, counts: np.ndarray, window: int) -> None:
        """One context.

        Args:
            log_probs: (length - 1,) of tokens i = 1, 2, ....
            distances: (length - 1,) from :func:`repeat_distances`.
            counts: (length - 1,) training counts of the pairs.
            window: tokens of a full context, whose half the jrt definition begins at.
        """
        scored = np.arange(1, len(log_probs) + 1) >= (window // 2 if self.second_half else 1)
        repeats = scored & (distances > 0)
        hits = repeats if self.threshold is None else repeats & (counts <= self.threshold)
        for name, chosen in (("all", scored), ("hits", hits), ("other", scored & ~hits)):
            self._sum(name, chosen, log_probs)
        # The exponent of a power of two exactly; of ten by comparison: logarithms round.
        self._bins("distance 2^{}", np.frexp(np.maximum(distances, 1))[1] - 1, hits, log_probs)
        decades = np.searchsorted(10 ** np.arange(1, 19), counts, side="right")
        self._bins("count 10^{}", decades, repeats & (counts > 0), log_probs)
        if (unseen := repeats & (counts == 0)).any():
            self._sum("count 0", unseen, log_probs)

    def _bins(self, name: str, exponents: np.ndarray, chosen: np.ndarray, log_probs: np.ndarray) -> None:
        for exponent in np.unique(exponents[chosen]).tolist():
            self._sum(name.format(exponent), chosen & (exponents == exponent), log_probs)

    def _sum(self, name: str, chosen: np.ndarray, log_probs: np.ndarray) -> None:
        self.slices[name] = self.slices.get(name, Slice()).plus(int(chosen.sum()), -float(log_probs[chosen].sum()))


def gap_share(slices: dict[str, Slice], other: dict[str, Slice]) -> float | None:
    """Share of the gap in loss between two models that lies on AR hits.

    share = (hits / all tokens) * (loss_other(hits) - loss(hits)) / (loss_other(all) - loss(all)); None where the
    models' losses are equal or there is no token.

    Raises:
        ValueError: slices over different tokens.
    """
    for name in ("all", "hits"):
        if slices[name].tokens != other[name].tokens:
            raise ValueError(
                f"the models were scored on {slices[name].tokens} and {other[name].tokens} tokens of {name!r}; a gap "
                "needs the same text, tokenizer, window and training counts"
            )
    gap = other["all"].nats - slices["all"].nats
    return (other["hits"].nats - slices["hits"].nats) / gap if gap else None


def slice_order(names: Iterable[str]) -> list[str]:
    """all, hits, other, then distances and counts ascending."""

    def key(name: str) -> tuple[int, int]:
        kind, _, bound = name.partition(" ")
        kinds = ["all", "hits", "other", "distance", "count"]
        return kinds.index(kind), int(bound.partition("^")[2] or -1) if bound else 0

    return sorted(names, key=key)
