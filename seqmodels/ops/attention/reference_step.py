"""One decode token by the definition: write the token's slot, then attend to every slot that is filled."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    capacity, exact = key_cache.shape[2], state_dtype(q.dtype)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row, seen in enumerate(position.tolist()):
        if (window is None or capacity < window) and seen >= capacity:
            raise ValueError(f"attention_step: row {row} has seen {seen} tokens and its cache holds {capacity}")
        key_cache[row, :, seen % capacity] = k[row]
        value_cache[row, :, seen % capacity] = v[row]
        first = max(0, seen + 1 - (capacity if window is None else min(window, capacity)))
        slots = torch.arange(first, seen + 1, device=q.device) % capacity
        repeats = q.shape[1] // k.shape[1]
        keys = key_cache[row][:, slots].to(exact).repeat_interleave(repeats, 0)
        values = value_cache[row][:, slots].to(exact).repeat_interleave(repeats, 0)
        weights = (scale * torch.einsum("hd,hjd->hj", q[row].to(exact), keys)).softmax(-1)
        y[row] = torch.einsum("hj,hjd->hd", weights, values).to(q.dtype)
    return y
