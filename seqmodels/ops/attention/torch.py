"""Softmax attention on the CPU in blocks, memory linear in the length.

PyTorch's CPU flash attention does the arithmetic; this file decides which keys each block of
queries is given. Documents go one after another. A document without a window and without a past is
one call, causal or not. Otherwise queries go in blocks: block [i0, i1) gets exactly the span of keys that
its queries can see together, and one additive (block, span) mask cuts the corners. The largest
mask is one block of queries by its span of keys.

The flash kernels are called below autograd, because the loop's gradient by autograd would
allocate a full-length gradient for every slice: the backward here accumulates into one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_LARGEST_BLOCK = 256
_SMALLEST_BLOCK = 64  # below it the cost of a call outweighs the masked products it saves


class _Group(NamedTuple):
    """Tokens that are computed together: a rectangle of the grid with one count of earlier tokens."""

    rows: slice
    columns: slice
    caches: slice
    seen: int


class _Block(NamedTuple):
    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None


def supports(q: Tensor, *_: object) -> str | None:
    if q.device.type != "cpu":
        return f"its blocks run on PyTorch's CPU flash attention; the tensors are on {q.device.type!r}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    scale: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    allocate = torch.empty if starts is None else torch.zeros
    y = allocate(q.shape, dtype=q.dtype)
    log_sum = allocate(q.shape[:3], dtype=state_dtype(q.dtype))
    for group in _groups(q, key_cache, position, starts, lengths, window):
        queries = q[group.rows, group.columns].transpose(1, 2)
        past = _past(group, key_cache, window)
        keys = _with_past(k, key_cache, group, past)
        values = _with_past(v, value_cache, group, past)
        out = y[group.rows, group.columns].transpose(1, 2)
        sums = log_sum[group.rows, group.columns].transpose(1, 2)
        for block in _blocks(queries.shape[2], keys.shape[2], window, bidirectional, q.dtype):
            part = (queries[:, :, block.queries], keys[:, :, block.keys], values[:, :, block.keys])
            result, sum_ = _flash(*part, 0.0, block.causal, attn_mask=block.mask, scale=scale)
            out[:, :, block.queries] = result
            sums[:, :, block.queries] = sum_
    return y, log_sum


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    scale: float,
    bidirectional: bool,
    y: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, ...]:
    grad = grad.contiguous()
    allocate = torch.empty if starts is None else torch.zeros
    grad_q, grad_k, grad_v = (allocate(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v))
    grad_key_cache = q.new_empty(0) if key_cache is None else torch.zeros_like(key_cache)
    grad_value_cache = q.new_empty(0) if value_cache is None else torch.zeros_like(value_cache)
    for group in _groups(q, key_cache, position, starts, lengths, window):
        at = (group.rows, group.columns)
        queries, out, sums, grad_out = (tensor[at].transpose(1, 2) for tensor in (q, y, log_sum, grad))
        past = _past(group, key_cache, window)
        keys = _with_past(k, key_cache, group, past)
        values = _with_past(v, value_cache, group, past)
        # Blocks overlap in their keys: sum in float32.
        grad_keys, grad_values = (torch.zeros(keys.shape, dtype=log_sum.dtype) for _ in range(2))
        for block in _blocks(queries.shape[2], keys.shape[2], window, bidirectional, q.dtype):
            rows, span = (slice(None), slice(None), block.queries), (slice(None), slice(None), block.keys)
            found_q, found_k, found_v = _flash_backward(
                grad_out[rows], queries[rows], keys[span], values[span], out[rows], sums[rows],
                0.0, block.causal, attn_mask=block.mask, scale=scale,
            )  # fmt: skip
            grad_q[at].transpose(1, 2)[rows] = found_q
            grad_keys[span] += found_k
            grad_values[span] += found_v
        grad_k[at] = grad_keys[:, :, past:].transpose(1, 2)
        grad_v[at] = grad_values[:, :, past:].transpose(1, 2)
        if past:
            for source, slots in _slots(group, key_cache, past):
                grad_key_cache[group.caches, :, slots] = grad_keys[:, :, source]
                grad_value_cache[group.caches, :, slots] = grad_values[:, :, source]
    return grad_q, grad_k, grad_v, grad_key_cache, grad_value_cache


def _groups(
    q: Tensor,
    key_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
) -> Iterator[_Group]:
    batch_size, length = q.shape[:2]
    everything = slice(0, length)
    if starts is None or lengths is None:
        seen = [0] if position is None else position.tolist()
        if len(set(seen)) == 1:
            groups = [_Group(slice(0, batch_size), everything, slice(0, batch_size), seen[0])]
        else:
            groups = [_Group(slice(b, b + 1), everything, slice(b, b + 1), past) for b, past in enumerate(seen)]
    else:
        groups = []
        seen = [0] * starts.shape[0] if position is None else position.tolist()
        for document, (start, count) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            if count:
                row, column = divmod(start, length)
                span = slice(column, column + count)
                groups.append(_Group(slice(row, row + 1), span, slice(document, document + 1), seen[document]))
    for group in groups:
        if key_cache is not None:
            capacity, count = key_cache.shape[2], group.columns.stop - group.columns.start
            if (window is None or capacity < window) and group.seen + count > capacity:
                raise ValueError(
                    f"attention: {count} tokens after {group.seen} do not fit a cache of {capacity}; "
                    f"make the state with max_length of at least {group.seen + count}"
                )
        yield group


def _past(group: _Group, key_cache: Tensor | None, window: int | None) -> int:
    """How many cached keys the group's first query can see."""
    if key_cache is None:
        return 0
    visible = min(group.seen, key_cache.shape[2])
    return visible if window is None else min(visible, window - 1)


def _slots(group: _Group, cache: Tensor | None, past: int) -> Iterator[tuple[slice, slice]]:
    """Where the last ``past`` tokens lie in the ring, in order of time: at most two runs."""
    assert cache is not None
    capacity = cache.shape[2]
    first = (group.seen - past) % capacity
    head = min(past, capacity - first)
    yield slice(0, head), slice(first, first + head)
    if head < past:
        yield slice(head, past), slice(0, past - head)


def _with_past(new: Tensor, cache: Tensor | None, group: _Group, past: int) -> Tensor:
    """(rows, key heads, past + new tokens, head_dim)."""
    tokens = new[group.rows, group.columns].transpose(1, 2)
    if past == 0 or cache is None:
        return tokens
    runs = [cache[group.caches, :, slots].to(new.dtype) for _, slots in _slots(group, cache, past)]
    return torch.cat([*runs, tokens], dim=2)


def _blocks(count: int, keys: int, window: int | None, bidirectional: bool, dtype: torch.dtype) -> Iterator[_Block]:
    """Blocks of queries with the keys they see; query i stands at key index keys - count + i."""
    past = keys - count
    if past == 0 and (window is None or window >= count):
        yield _Block(slice(0, count), slice(0, count), not bidirectional, None)
        return
    size = _LARGEST_BLOCK if window is None else min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, window))
    mask, made_for = None, None
    for begin in range(0, count, size):
        end = min(begin + size, count)
        first = 0 if window is None else max(0, past + begin - window + 1)
        last = past + end if window is None or not bidirectional else min(keys, past + end + window - 1)
        place = (end - begin, last - first, past + begin - first)
        if end - begin == 1:
            mask = None  # one query sees its whole span
        elif place != made_for:
            mask, made_for = _mask(*place, window, bidirectional, dtype), place
        yield _Block(slice(begin, end), slice(first, last), False, mask)


def _mask(queries: int, keys: int, begin: int, window: int | None, bidirectional: bool, dtype: torch.dtype) -> Tensor:
    """Additive mask for queries that stand at key index ``begin`` and on."""
    ahead = 0 if window is None or not bidirectional else window - 1  # the farthest later key that is seen
    mask = torch.full((queries, keys), float("-inf"), dtype=dtype).triu_(begin + ahead + 1)
    if window is not None and keys > window:
        mask += torch.full((queries, keys), float("-inf"), dtype=dtype).tril_(begin - window)
    return mask
