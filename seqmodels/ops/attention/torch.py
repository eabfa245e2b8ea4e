"""Softmax attention on the CPU in blocks, memory linear in the length.

PyTorch's CPU flash attention does the arithmetic; this file decides which keys each block of
queries is given. Documents go one after another. A document without a window and without a past is
one call, causal or not. Otherwise queries go in blocks: block [i0, i1) gets exactly the keys that its queries
can see together, the pinned ones and a span, and one additive mask cuts the corners. The largest mask is one
block of queries by its keys.

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
    front: int  # keys taken from the beginning: pinned ones
    keys: slice  # and the span behind them
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
    pinned: int,
) -> tuple[Tensor, Tensor]:
    allocate = torch.empty if starts is None else torch.zeros
    y = allocate(q.shape, dtype=q.dtype)
    log_sum = allocate(q.shape[:3], dtype=state_dtype(q.dtype))
    for group in _groups(q, position, starts, lengths):
        queries = q[group.rows, group.columns].transpose(1, 2)
        past = _past(group, key_cache, window, pinned)
        keys = _with_past(k, key_cache, past, group)
        values = _with_past(v, value_cache, past, group)
        out = y[group.rows, group.columns].transpose(1, 2)
        sums = log_sum[group.rows, group.columns].transpose(1, 2)
        for block in _blocks(queries.shape[2], keys.shape[2], window, bidirectional, q.dtype, pinned):
            part = (queries[:, :, block.queries], _pick(keys, block), _pick(values, block))
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
    pinned: int,
    y: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, ...]:
    grad = grad.contiguous()
    allocate = torch.empty if starts is None else torch.zeros
    grad_q, grad_k, grad_v = (allocate(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v))
    grad_key_cache = q.new_empty(0) if key_cache is None else torch.zeros_like(key_cache)
    grad_value_cache = q.new_empty(0) if value_cache is None else torch.zeros_like(value_cache)
    for group in _groups(q, position, starts, lengths):
        at = (group.rows, group.columns)
        queries, out, sums, grad_out = (tensor[at].transpose(1, 2) for tensor in (q, y, log_sum, grad))
        past = _past(group, key_cache, window, pinned)
        keys = _with_past(k, key_cache, past, group)
        values = _with_past(v, value_cache, past, group)
        # Blocks overlap in their keys: sum in float32.
        grad_keys, grad_values = (torch.zeros(keys.shape, dtype=log_sum.dtype) for _ in range(2))
        for block in _blocks(queries.shape[2], keys.shape[2], window, bidirectional, q.dtype, pinned):
            rows = (slice(None), slice(None), block.queries)
            found_q, found_k, found_v = _flash_backward(
                grad_out[rows], queries[rows], _pick(keys, block), _pick(values, block), out[rows], sums[rows],
                0.0, block.causal, attn_mask=block.mask, scale=scale,
            )  # fmt: skip
            grad_q[at].transpose(1, 2)[rows] = found_q
            for total, found in ((grad_keys, found_k), (grad_values, found_v)):
                total[:, :, : block.front] += found[:, :, : block.front]
                total[:, :, block.keys] += found[:, :, block.front :]
        held = sum(source.stop - source.start for source, _ in past)
        grad_k[at] = grad_keys[:, :, held:].transpose(1, 2)
        grad_v[at] = grad_values[:, :, held:].transpose(1, 2)
        if past:
            for source, slots in past:
                grad_key_cache[group.caches, :, slots] = grad_keys[:, :, source]
                grad_value_cache[group.caches, :, slots] = grad_values[:, :, source]
    return grad_q, grad_k, grad_v, grad_key_cache, grad_value_cache


def _groups(q: Tensor, position: Tensor | None, starts: Tensor | None, lengths: Tensor | None) -> Iterator[_Group]:
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
    yield from groups


def _past(group: _Group, cache: Tensor | None, window: int | None, pinned: int) -> list[tuple[slice, slice]]:
    """The cached keys that the group's first query can see, in order of time: runs (place in that order, slots)."""
    if cache is None:
        return []
    capacity, seen = cache.shape[2], group.seen
    front = min(seen, pinned)
    recent = min(seen, capacity) - front
    recent = recent if window is None else min(recent, window - 1)
    runs, first = [(0, front)], seen - recent
    if recent and seen <= capacity:
        runs.append((first, recent))
    elif recent:  # the ring has wrapped: at most two runs
        start = pinned + (first - pinned) % (capacity - pinned)
        head = min(recent, capacity - start)
        runs += [(start, head), (pinned, recent - head)]
    result, place = [], 0
    for slot, count in runs:
        if count:
            result.append((slice(place, place + count), slice(slot, slot + count)))
            place += count
    return result


def _with_past(new: Tensor, cache: Tensor | None, past: list[tuple[slice, slice]], group: _Group) -> Tensor:
    """(rows, key heads, past + new tokens, head_dim)."""
    tokens = new[group.rows, group.columns].transpose(1, 2)
    if not past or cache is None:
        return tokens
    return torch.cat([*(cache[group.caches, :, slots].to(new.dtype) for _, slots in past), tokens], dim=2)


def _pick(keys: Tensor, block: _Block) -> Tensor:
    """The keys of a block: the pinned ones, and the span behind them."""
    if block.front == block.keys.start:
        return keys[:, :, : block.keys.stop]
    if block.front == 0:
        return keys[:, :, block.keys]
    return torch.cat([keys[:, :, : block.front], keys[:, :, block.keys]], dim=2)


def _blocks(
    count: int, keys: int, window: int | None, bidirectional: bool, dtype: torch.dtype, pinned: int = 0
) -> Iterator[_Block]:
    """Blocks of queries with the keys they see; query i stands at key index keys - count + i.

    The pinned keys are the first ones, from the past or new.
    """
    past = keys - count
    if past == 0 and (window is None or window >= count):
        yield _Block(slice(0, count), 0, slice(0, count), not bidirectional, None)
        return
    size = _LARGEST_BLOCK if window is None else min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, window))
    mask, made_for = None, None
    for begin in range(0, count, size):
        end = min(begin + size, count)
        last = past + end if window is None or not bidirectional else min(keys, past + end + window - 1)
        front = 0 if window is None else min(pinned, last)
        first = 0 if window is None else max(front, past + begin - window + 1)
        place = (end - begin, last - first, past + begin - first, min(past + begin, pinned))
        if end - begin == 1:
            mask = None  # one query sees all of its keys
        elif place != made_for:
            mask, made_for = _mask(*place[:3], window, bidirectional, dtype), place
            if front:
                mask = torch.cat([_mask(end - begin, front, past + begin, None, False, dtype), mask], dim=1)
        yield _Block(slice(begin, end), front, slice(first, last), False, mask)


def _mask(queries: int, keys: int, begin: int, window: int | None, bidirectional: bool, dtype: torch.dtype) -> Tensor:
    """Additive mask for queries that stand at key index ``begin`` and on."""
    ahead = 0 if window is None or not bidirectional else window - 1  # the farthest later key that is seen
    mask = torch.full((queries, keys), float("-inf"), dtype=dtype).triu_(begin + ahead + 1)
    if window is not None and keys > window:
        mask += torch.full((queries, keys), float("-inf"), dtype=dtype).tril_(begin - window)
    return mask
