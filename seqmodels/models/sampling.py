"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED_POINT = 2**40  # probabilities as integers: a parallel sum of them is exact, so every device agrees


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from p = softmax(logits / temperature), after the filters.

    Attributes:
        temperature: 0 takes the most likely token (greedy).
        top_k: keep the ``top_k`` most likely tokens.
        top_p: keep the most likely tokens until their probability reaches ``top_p`` (nucleus;
            Holtzman et al. 2020); the most likely one always stays.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that are
            in the text already (Keskar et al. 2019); 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature!r}; expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k!r}; expected at least 1, or None to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; expected 0 < top_p <= 1, or None to keep all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty!r}; expected a positive number, 1 for none"
            )


GREEDY = Sampling(temperature=0.0)


def token_probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """(batch, vocab) probabilities after penalty, temperature, top-k and top-p, in float32.

    Args:
        logits: (batch, vocab).
        sampling: the filters; a temperature of 0 puts all probability on the most likely token.
        seen: (batch, vocab) bool, tokens that the repetition penalty applies to.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    # The difference first, and no divisor that float32 rounds to zero: 0 / 0 and inf - inf are not probabilities.
    logits = (logits - logits.amax(1, keepdim=True)) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        kept = logits.topk(sampling.top_k, dim=1).indices
        logits = torch.full_like(logits, -math.inf).scatter_(1, kept, logits.gather(1, kept))
    probabilities = logits.softmax(1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        integers = _fixed_point(ordered)
        before = integers.cumsum(1) - integers  # the most likely token has nothing before it, so it stays
        ordered = ordered.masked_fill(before >= sampling.top_p * FIXED_POINT, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(batch,) tokens by inverting the cumulative probability at ``uniform`` (batch,) float32 in [0, 1).

    The draws come from outside, so that a row's tokens depend on its own numbers alone, whatever
    else is in the batch and on whatever device.
    """
    cumulative = _fixed_point(probabilities).cumsum(1)
    # uniform <= 1 - 2^-24, so the threshold stays below the total.
    threshold = (uniform.double()[:, None] * cumulative[:, -1:]).floor().long()
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _fixed_point(probabilities: Tensor) -> Tensor:
    return (probabilities.double() * FIXED_POINT).round().long()
