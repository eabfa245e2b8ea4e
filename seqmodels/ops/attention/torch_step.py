"""One decode token with PyTorch's attention.

On a GPU nothing is read on the host: the filled slots are a mask over the whole cache. On the CPU
the largest position is read, so that a cache that is mostly empty is mostly not touched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.ops.attention.cache import slot_of


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
    batch_size, heads, head_dim = q.shape
    groups, capacity = k.shape[1], key_cache.shape[2]
    bounded = window is None or capacity < window + pinned
    filled, uniform = capacity, False
    if position.device.type == "cpu":
        low, high = position.aminmax()
        filled, uniform = min(int(high) + 1, capacity), bool(low == high) or int(low) + 1 >= capacity
        if bounded and int(high) >= capacity:
            raise ValueError(
                f"attention_step: {int(high)} tokens are in a cache of {capacity}, so it is full; "
                "make the state with a larger max_length"
            )
    elif bounded:
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            (position < capacity).all(), "attention_step: the cache is full; use a larger max_length"
        )
    index = slot_of(position, capacity, pinned).view(-1, 1, 1, 1).expand(-1, groups, 1, head_dim)
    key_cache.scatter_(2, index, k.unsqueeze(2))
    value_cache.scatter_(2, index, v.unsqueeze(2))
    keys, values = key_cache[:, :, :filled], value_cache[:, :, :filled]
    mask = None
    if not uniform:
        slots = torch.arange(filled, device=q.device)
        # The heads of a group are the "queries" below, and all see the same slots.
        mask = (slots <= position[:, None]).view(batch_size, 1, 1, filled)
    queries = q.view(batch_size, groups, heads // groups, head_dim)
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return y.reshape(batch_size, heads, head_dim)
