"""Attention weights of a map beside the softmax they stand in for: how spiky, how monotone, how close.

For rows P (softmax) and A (a map), j over the n tokens that query i sees:

    entropy       H_i = -sum_j A_ij ln A_ij, in nats; ln n for equal weights
    monotonicity  Spearman's rank correlation of q_i . k_j and A_ij over j
    divergence    KL(P_i || A_i) = sum_j P_ij ln(P_ij / A_ij), in nats
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqmodels.mixers.feature_maps import FeatureMap, paired_features

FLOOR = 1e-12  # of a weight inside a logarithm
FEWEST = 8  # visible tokens of a row whose ranks are compared: fewer have ranks by chance


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal softmax attention, scaled by 1 / sqrt(width): (batch, heads, L, L)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~_causal(q), float("-inf")).softmax(-1)


def map_weights(query_map: FeatureMap, key_map: FeatureMap, q: Tensor, k: Tensor) -> Tensor:
    """Causal linear attention's weights by their definition: (batch, heads, L, L)."""
    phi_q, phi_k = paired_features(query_map, key_map, q, k)
    weights = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k) * _causal(q)
    return weights / (weights.sum(-1, keepdim=True) + query_map.epsilon)


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """-sum_j P_ij ln A_ij, the mean over rows: what distillation minimises."""
    return -(teacher * student.clamp_min(FLOOR).log()).sum(-1).mean()


def entropy(weights: Tensor) -> float:
    return float(-(weights * weights.clamp_min(FLOOR).log()).sum(-1).mean())


def divergence(teacher: Tensor, student: Tensor) -> float:
    return float(cross_entropy(teacher, student)) - entropy(teacher)


def uniform_entropy(length: int) -> float:
    """The mean of ln n over causal rows of 1 to ``length`` tokens."""
    return sum(math.log(n) for n in range(1, length + 1)) / length


def monotonicity(q: Tensor, k: Tensor, weights: Tensor) -> float:
    """Mean over rows of at least FEWEST tokens; ties share their mean rank, and a row of equal weights counts 0."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    found = []
    for row in range(FEWEST - 1, q.shape[1]):
        a, b = (_ranks(x[..., row, : row + 1]) for x in (scores, weights))
        a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
        norm = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
        found.append(torch.where(norm > 0, (a * b).sum(-1) / norm.clamp_min(1e-30), 0).flatten())
    return float(torch.cat(found).mean())


def _ranks(x: Tensor) -> Tensor:
    """Ranks along the last dimension, equal values sharing their mean rank, as (how many are smaller + how many are
    not larger) / 2."""
    smaller = (x[..., :, None] > x[..., None, :]).sum(-1)
    not_larger = (x[..., :, None] >= x[..., None, :]).sum(-1)
    return (smaller + not_larger).double() / 2


def _causal(q: Tensor) -> Tensor:
    return torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
