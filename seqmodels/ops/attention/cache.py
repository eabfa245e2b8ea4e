"""The key-value cache: a ring of slots whose index is the absolute position modulo its capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout


def empty_cache(
    batch_size: int,
    heads: int,
    capacity: int,
    head_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Zeros (batch, key heads, capacity, head_dim): slot p mod capacity holds the token at position p."""
    return torch.zeros(batch_size, heads, capacity, head_dim, device=device, dtype=dtype)


def append_to_cache(
    key_cache: Tensor, value_cache: Tensor, position: Tensor, k: Tensor, v: Tensor, *, layout: Layout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The caches after the tokens of ``k`` and ``v``: new tensors, differentiable, nothing in place.

    Slot s of document d holds, after n_d tokens in all, the token at the largest position
    p < n_d with p = s (mod capacity): a new one where p is at least ``position[d]``, else what
    was there.

    Args:
        key_cache, value_cache: (documents, key heads, capacity, head_dim).
        position: (documents,) int64, tokens seen before.
        k, v: (batch, length, key heads, head_dim).
        layout: documents; None for one a row.

    Returns:
        key cache, value cache and position of the same shapes and dtypes.
    """
    batch_size, length = k.shape[:2]
    capacity = key_cache.shape[2]
    if layout is None:
        starts = torch.arange(batch_size, device=k.device) * length
        total = position + length
    else:
        starts, total = layout.starts, position + layout.lengths
    slots = torch.arange(capacity, device=k.device)
    last = (total - 1)[:, None]
    token = last - (last - slots) % capacity - position[:, None]  # (documents, capacity), index among the new ones
    fresh = (token >= 0)[:, None, :, None]
    source = (starts[:, None] + token).clamp(0, batch_size * length - 1).flatten()

    def updated(cache: Tensor, new: Tensor) -> Tensor:
        picked = new.flatten(0, 1).flatten(1).index_select(0, source)
        picked = picked.view(cache.shape[0], capacity, cache.shape[1], cache.shape[3]).transpose(1, 2)
        return torch.where(fresh, picked.to(cache.dtype), cache).contiguous()  # decode writes it in place

    return updated(key_cache, k), updated(value_cache, v), total
