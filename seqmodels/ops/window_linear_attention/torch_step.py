"""One decode token in plain PyTorch; both rings are updated in place, nothing is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype

_TINY = 1e-30


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    factor: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    batch_size, heads, head_dim = q.shape
    groups, window = key_cache.shape[1:3]
    exact = state_dtype(q.dtype)
    slot = (position % window).view(-1, 1, 1, 1)
    key_cache.scatter_(2, slot.expand(-1, groups, 1, head_dim), k.unsqueeze(2))
    value_cache.scatter_(2, slot.expand(-1, groups, 1, v.shape[-1]), v.unsqueeze(2))
    queries = q.view(batch_size, groups, heads // groups, head_dim).to(exact)
    scores = scale * (queries @ key_cache.to(exact).transpose(-1, -2))
    empty = torch.arange(window, device=q.device) > position[:, None]
    scores = scores.masked_fill(empty[:, None, None], float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * factor.to(exact).view(groups, -1, 1)
    past = past.to(exact).view(batch_size, groups, heads // groups, -1)
    divisor = weights.sum(-1, keepdim=True) + past[..., -1:] + _TINY
    y = (weights @ value_cache.to(exact) + past[..., :-1]) / divisor
    return y.view(batch_size, heads, -1).to(q.dtype)
