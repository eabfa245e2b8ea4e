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
    pinned: int = 0,
) -> Tensor:
    capacity, exact = key_cache.shape[2], state_dtype(q.dtype)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row, seen in enumerate(position.tolist()):
        if (window is None or capacity < window + pinned) and seen >= capacity:
            raise ValueError(f"attention_step: row {row} has seen {seen} tokens and its cache holds {capacity}")
        places = torch.arange(seen + 1, device=q.device)
        if window is not None:
            places = places[(places < pinned) | (places > seen - window)]
        slots = torch.where(places < capacity, places, pinned + (places - pinned) % max(1, capacity - pinned))
        key_cache[row, :, slots[-1]] = k[row]
        value_cache[row, :, slots[-1]] = v[row]
        repeats = q.shape[1] // k.shape[1]
        keys = key_cache[row][:, slots].to(exact).repeat_interleave(repeats, 0)
        values = value_cache[row][:, slots].to(exact).repeat_interleave(repeats, 0)
        weights = (scale * torch.einsum("hd,hjd->hj", q[row].to(exact), keys)).softmax(-1)
        y[row] = torch.einsum("hj,hjd->hd", weights, values).to(q.dtype)
    return y
