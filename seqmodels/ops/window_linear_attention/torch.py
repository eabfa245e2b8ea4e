"""A softmax window joined to a linear past, in blocks of queries; memory linear in the length.

Documents are cut into blocks of C queries, at least as many as the window holds, so that a block sees
itself and window - 1 tokens before it: of the block before, or of the ring for a document's first block.
One table of (blocks, C + window - 1) row numbers says where those keys lie, in the grid or in the rings
behind it. Blocks are taken in groups whose scores stay in the processor's cache, and the backward computes
the scores again: what is kept is one divisor for each query.

Gradients, with e_ij = dn_i . v_j + dz_i, where dn = dy / divisor and dz = -(dn . y) are also the gradient to
the past, and r_i = sum_j p_ij e_ij:

    df = sum_i r_i,    ds_ij = f (p_ij e_ij - [j is the largest] r_i),    dv_j = f sum_i p_ij dn_i

The term of the largest is the gradient of c_i, which does not cancel: the past is not scaled by e^{-c_i}.

Shape legend: T blocks, C queries, S = C + window - 1 keys, G key heads, r query heads of one, d and P widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.ops.documents import chunk_table, token_table
from seqmodels.ops.registration import state_dtype

_TINY = 1e-30
_SMALLEST_BLOCK = 32  # below it the products are too small to pay for their calls
_SCORES = 1 << 19  # elements of one group of blocks


class _Blocks(NamedTuple):
    """Row numbers: ``query`` (T, C) into the grid, ``key`` (T, S) into grid and rings; what of it is there."""

    query: Tensor
    key: Tensor
    query_valid: Tensor
    key_valid: Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    factor: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch_size, length, heads, _ = q.shape
    exact, groups = state_dtype(q.dtype), k.shape[2]
    blocks = _blocks(q, position, starts, lengths, window)
    keys, values = _rows(k, key_cache), _rows(v, value_cache)
    flat_q, flat_past = q.flatten(0, 1), past.flatten(0, 1)
    factor = factor.to(exact).view(groups, -1, 1, 1)
    # Tokens outside documents go to a row behind the grid.
    y = q.new_zeros((batch_size * length + 1, heads, v.shape[-1]))
    divisor = torch.ones(y.shape[:2], dtype=exact, device=q.device)
    for part in _groups(blocks, heads):
        weights = _weights(flat_q, keys, part, groups, window, scale)
        before = _queries(flat_past, part, groups)
        total = factor * weights.sum(-1, keepdim=True) + before[..., -1:] + _TINY
        mixed = weights.flatten(2, 3) @ _keys(values, part, exact)
        out = (factor * mixed.view(*weights.shape[:4], -1) + before[..., :-1]) / total
        rows = torch.where(part.query_valid, part.query, batch_size * length).flatten()
        y.index_copy_(0, rows, _tokens(out).to(y.dtype))
        divisor.index_copy_(0, rows, _tokens(total)[..., 0])
    shape = (batch_size, length, heads)
    return y[:-1].view(*shape, -1), divisor[:-1].view(shape)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    factor: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
    scale: float,
    y: Tensor,
    divisor: Tensor,
) -> tuple[Tensor, ...]:
    batch_size, length, heads, _ = q.shape
    exact, groups = state_dtype(q.dtype), k.shape[2]
    blocks = _blocks(q, position, starts, lengths, window)
    keys, values = _rows(k, key_cache), _rows(v, value_cache)
    flat_q = q.flatten(0, 1)
    grad_past = _gradient_to_past(grad, y, divisor, starts, lengths)
    per_head = factor.to(exact).view(groups, -1, 1, 1)
    grad_q = q.new_zeros((batch_size * length + 1, *q.shape[2:]))
    grad_keys, grad_values = (torch.zeros(rows.shape, dtype=exact, device=q.device) for rows in (keys, values))
    grad_factor = torch.zeros(per_head.shape[:2], dtype=exact, device=q.device)
    for part in _groups(blocks, heads):
        weights = _weights(flat_q, keys, part, groups, window, scale)
        outer = _queries(grad_past, part, groups).masked_fill_(~part.query_valid[:, None, None, :, None], 0)
        wide = weights.flatten(2, 3)
        slope = (outer[..., :-1].flatten(2, 3) @ _keys(values, part, exact).transpose(-1, -2)).view_as(weights)
        slope = slope.add_(outer[..., -1:]).mul_(weights)
        total = slope.sum(-1, keepdim=True)
        grad_factor += total.sum((0, 3, 4))
        # weight 1 is e^0: the largest score of the row, or several that are equal
        top = weights == 1
        slope = slope.sub_(top * (total / top.sum(-1, keepdim=True).clamp_min(1))).mul_(per_head)
        rows = torch.where(part.query_valid, part.query, batch_size * length).flatten()
        found = (slope.flatten(2, 3) @ _keys(keys, part, exact)).mul_(scale)
        grad_q.index_copy_(0, rows, _tokens(found.view(*weights.shape[:4], -1)).to(q.dtype))
        queries = _queries(flat_q, part, groups).masked_fill_(~part.query_valid[:, None, None, :, None], 0)
        queries = queries.flatten(2, 3)
        _add(grad_keys, part, (slope.flatten(2, 3).transpose(-1, -2) @ queries).mul_(scale))
        _add(grad_values, part, wide.transpose(-1, -2) @ (outer[..., :-1] * per_head).flatten(2, 3))
    tokens = batch_size * length
    return (
        grad_q[:-1].view_as(q),
        grad_keys[:tokens].view(k.shape).to(k.dtype),
        grad_values[:tokens].view(v.shape).to(v.dtype),
        grad_past.view(past.shape).to(past.dtype),
        grad_factor.flatten().to(factor.dtype),
        _cache_gradient(grad_keys[tokens:], key_cache, q),
        _cache_gradient(grad_values[tokens:], value_cache, q),
    )


def _gradient_to_past(
    grad: Tensor, y: Tensor, divisor: Tensor, starts: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """[dn, dz] (tokens, heads, P + 1), zero outside documents."""
    numerator = grad.to(divisor.dtype) / divisor.unsqueeze(-1)
    if starts is not None and lengths is not None:
        valid = token_table(starts, lengths, *grad.shape[:2]).valid
        numerator = numerator.masked_fill_(~valid[..., None, None], 0)
    normaliser = -(numerator * y.to(divisor.dtype)).sum(-1, keepdim=True)
    return torch.cat([numerator, normaliser], dim=-1).flatten(0, 1)


def _blocks(q: Tensor, position: Tensor | None, starts: Tensor | None, lengths: Tensor | None, window: int) -> _Blocks:
    batch_size, length = q.shape[:2]
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=q.device) * length
        lengths = torch.full_like(starts, length)
    size = min(max(window, _SMALLEST_BLOCK), length)
    table = chunk_table(starts, lengths, batch_size * length, size)
    first = table.token[:, :1] - starts[table.document][:, None]
    used = table.valid[:, :1]
    at = first + torch.arange(1 - window, size, device=q.device)  # in the document; negative before these tokens
    inside = (at >= 0) & (at < lengths[table.document][:, None]) & used
    row = starts[table.document][:, None] + at
    if position is None:
        return _Blocks(table.token, row * inside, table.valid, inside)
    absolute = at + position[table.document][:, None]
    earlier = (at < 0) & (absolute >= 0) & used
    ring = batch_size * length + table.document[:, None] * window + absolute % window
    return _Blocks(table.token, torch.where(earlier, ring, row * inside), table.valid, inside | earlier)


def _groups(blocks: _Blocks, heads: int) -> Iterator[_Blocks]:
    count = max(1, _SCORES // (heads * blocks.query.shape[1] * blocks.key.shape[1]))
    for begin in range(0, blocks.query.shape[0], count):
        yield _Blocks(*(table[begin : begin + count] for table in blocks))


def _weights(q: Tensor, keys: Tensor, part: _Blocks, groups: int, window: int, scale: float) -> Tensor:
    """e^{s - c} (T, G, r, C, S), zero where not visible."""
    queries = _queries(q, part, groups)
    scores = (queries.flatten(2, 3) @ _keys(keys, part, queries.dtype).transpose(-1, -2)).mul_(scale)
    scores = scores.view(*queries.shape[:4], -1)
    size, span = scores.shape[-2:]
    offset = torch.arange(span, device=q.device) - torch.arange(size, device=q.device)[:, None]
    visible = (offset >= 0) & (offset < window) & part.key_valid[:, None] & part.query_valid[..., None]
    scores = scores.masked_fill_(~visible[:, None, None], float("-inf"))
    largest = scores.amax(-1, keepdim=True).masked_fill_(~part.query_valid[:, None, None, :, None], 0)
    return scores.sub_(largest).exp_()


def _rows(new: Tensor, cache: Tensor | None) -> Tensor:
    """(tokens, G, width), the rings' slots behind the grid's tokens."""
    flat = new.flatten(0, 1)
    return flat if cache is None else torch.cat([flat, cache.transpose(1, 2).flatten(0, 1)])


def _keys(rows: Tensor, part: _Blocks, dtype: torch.dtype) -> Tensor:
    """(T, G, S, width)."""
    found = rows.index_select(0, part.key.flatten()).to(dtype)
    found = found.view(*part.key.shape, *rows.shape[1:]).masked_fill(~part.key_valid[..., None, None], 0)
    return found.transpose(1, 2)


def _queries(rows: Tensor, part: _Blocks, groups: int) -> Tensor:
    """(T, G, r, C, width), wide."""
    found = rows.index_select(0, part.query.flatten()).to(state_dtype(rows.dtype))
    count, size = part.query.shape
    return found.view(count, size, groups, -1, rows.shape[-1]).permute(0, 2, 3, 1, 4)


def _tokens(x: Tensor) -> Tensor:
    """(T, G, r, C, width) to (T C, H, width)."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _add(total: Tensor, part: _Blocks, found: Tensor) -> None:
    """Adds (T, G, S, width) to the rows it came from. A key stands in at most two blocks, so that the order of
    the sum cannot matter."""
    total.index_add_(0, part.key.flatten(), found.transpose(1, 2).flatten(0, 1))


def _cache_gradient(rows: Tensor, cache: Tensor | None, q: Tensor) -> Tensor:
    if cache is None:
        return q.new_empty(0)
    documents, groups, window, width = cache.shape
    # A copy: the rows are a part of the buffer that the tokens' gradient is returned in.
    return rows.view(documents, window, groups, width).transpose(1, 2).to(cache.dtype, copy=True)
