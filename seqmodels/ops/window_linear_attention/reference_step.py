"""One decode token by the definition: write the token's slot, then read every slot that is filled."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype
from seqmodels.ops.window_linear_attention.reference import joined


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
    window, exact = key_cache.shape[2], state_dtype(q.dtype)
    repeats = q.shape[1] // k.shape[1]
    y = q.new_empty((*q.shape[:2], v.shape[-1]))
    for row, seen in enumerate(position.tolist()):
        key_cache[row, :, seen % window] = k[row]
        value_cache[row, :, seen % window] = v[row]
        slots = torch.arange(max(0, seen + 1 - window), seen + 1, device=q.device) % window
        keys = key_cache[row][:, slots].to(exact).transpose(0, 1).repeat_interleave(repeats, 1)
        values = value_cache[row][:, slots].to(exact).transpose(0, 1).repeat_interleave(repeats, 1)
        visible = torch.ones((1, len(slots)), dtype=torch.bool, device=q.device)
        token = (tensor[row : row + 1].to(exact) for tensor in (q, past))
        query, before = token
        y[row] = joined(query, keys, values, before, factor.to(exact), visible, scale)[0][0].to(q.dtype)
    return y
