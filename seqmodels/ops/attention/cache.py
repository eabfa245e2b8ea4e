"""The key-value cache: slot p holds the token at position p, as long as there are slots.

A cache that wraps keeps its first ``pinned`` slots and is a ring of ``capacity - pinned`` beyond them: the
token at position p >= pinned lies in slot pinned + (p - pinned) mod (capacity - pinned).
"""

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
    """Zeros (batch, key heads, capacity, head_dim)."""
    return torch.zeros(batch_size, heads, capacity, head_dim, device=device, dtype=dtype)


def slot_of(position: Tensor, capacity: int, pinned: int = 0) -> Tensor:
    """The slot of the token at each position."""
    ring = max(1, capacity - pinned)  # no slot beyond the pinned ones: nothing wraps
    return torch.where(position < capacity, position, pinned + (position - pinned) % ring)


def held_positions(position: Tensor, capacity: int, pinned: int = 0) -> Tensor:
    """(documents, capacity): the position of the token in each slot after ``position`` tokens, below 0 where empty."""
    slots = torch.arange(capacity, device=position.device)
    last = position[:, None] - 1
    newest = last - (last - slots) % max(1, capacity - pinned)
    held = torch.where(slots < pinned, slots, newest)
    return torch.where((held <= last) & (held >= slots.clamp(max=pinned)), held, -1)


def append_to_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout | None = None,
    pinned: int = 0,
    wraps: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The caches after the tokens of ``k`` and ``v``: new tensors, differentiable, nothing in place.

    Each slot holds the newest of the tokens that belong there: a new one, or what was there.

    Args:
        key_cache, value_cache: (documents, key heads, capacity, head_dim).
        position: (documents,) int64, tokens seen before.
        k, v: (batch, length, key heads, head_dim).
        layout: documents; None for one a row.
        pinned: slots that are never overwritten.
        wraps: later tokens may overwrite earlier ones; False refuses more tokens than there are slots.

    Returns:
        key cache, value cache and position of the same shapes and dtypes.

    Raises:
        ValueError: a cache that does not wrap is too small. On a GPU, where positions are known to the
            device only, that is a device assertion.
    """
    batch_size, length = k.shape[:2]
    capacity = key_cache.shape[2]
    if layout is None:
        starts = torch.arange(batch_size, device=k.device) * length
        total = position + length
    else:
        starts, total = layout.starts, position + layout.lengths
    if not wraps:
        check_fits(total, capacity, new=total - position)
    held = held_positions(total, capacity, pinned)
    token = held - position[:, None]  # (documents, capacity), index among the new ones
    fresh = ((held >= 0) & (token >= 0))[:, None, :, None]
    source = (starts[:, None] + token).clamp(0, batch_size * length - 1).flatten()

    def updated(cache: Tensor, new: Tensor) -> Tensor:
        picked = new.flatten(0, 1).flatten(1).index_select(0, source)
        picked = picked.view(cache.shape[0], capacity, cache.shape[1], cache.shape[3]).transpose(1, 2)
        return torch.where(fresh, picked.to(cache.dtype), cache).contiguous()  # decode writes it in place

    return updated(key_cache, k), updated(value_cache, v), total


def check_fits(position: Tensor, capacity: int, new: Tensor | None = None) -> None:
    """Refuses more tokens than slots: ``position`` (documents,) in all, of which ``new`` would come now.

    A ValueError on the CPU, a device assertion elsewhere and in compiled code.
    """
    # Reading a number is free and possible for real tensors on the CPU alone.
    if position.device.type != "cpu" or type(position) is not Tensor or torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(
            (position <= capacity).all(), "attention: the cache is full; make the state with a larger max_length"
        )
        return
    document = int(position.argmax())
    total = int(position[document])
    if total > capacity:
        tokens = f"{total} tokens" if new is None else f"{int(new[document])} tokens after {total - int(new[document])}"
        raise ValueError(
            f"attention: {tokens} do not fit a cache of {capacity}; make the state with max_length of at least {total}"
        )
