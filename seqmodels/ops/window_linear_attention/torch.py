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
Heads stand first, so that a block's rows are contiguous and products copy nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmodels.ops.documents import chunk_table, token_table
from seqmodels.ops.registration import state_dtype

_TINY = 1e-30
_SMALLEST_BLOCK = 32  # below it the products are too small to pay for their calls
_SCORES = 1 << 19  # elements of one group of blocks


class _Blocks(NamedTuple):
    """Row numbers: ``query`` (T, C) into the grid, ``key`` (T, S) into grid and rings; a zero row behind the last one
    stands for what is not there. ``key_there`` (T, S) is False for those."""

    query: Tensor
    key: Tensor
    key_there: Tensor


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
    tokens, groups = batch_size * length, k.shape[2]
    blocks = _blocks(q, position, starts, lengths, window)
    queries, before = _rows(q).mul_(scale), _rows(past)
    keys, values = _rows(k, key_cache), _rows(v, value_cache)
    factor = factor.to(queries.dtype).view(groups, 1, -1, 1, 1)
    # The row behind the grid takes what blocks have beyond their documents.
    y = queries.new_zeros((heads, tokens + 1, v.shape[-1]))
    divisor = queries.new_ones((heads, tokens + 1))
    for part in _groups(blocks, heads):
        weights = _weights(queries, keys, part, groups, window)
        past_part = _take(before, part.query, groups)
        total = factor * weights.sum(-1, keepdim=True) + past_part[..., -1:] + _TINY
        mixed = (weights.flatten(2, 3) @ _take(values, part.key)).view_as(past_part[..., :-1])
        out = torch.addcmul(past_part[..., :-1], factor, mixed).div_(total)
        rows = part.query.flatten()
        y.index_copy_(1, rows, _by_head(out))
        divisor.index_copy_(1, rows, _by_head(total).squeeze(-1))
    # What no block wrote stays as it was made: 0 / 1 outside documents.
    y, divisor = (x[:, :-1].transpose(0, 1).contiguous() for x in (y, divisor))
    return y.view(batch_size, length, heads, -1).to(q.dtype), divisor.view(batch_size, length, heads)


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
    tokens, groups = batch_size * length, k.shape[2]
    blocks = _blocks(q, position, starts, lengths, window)
    queries, keys, values = _rows(q).mul_(scale), _rows(k, key_cache), _rows(v, value_cache)
    grad_past = _gradient_to_past(grad, y, divisor, starts, lengths)
    outer_rows = _rows(grad_past)
    per_head = factor.to(queries.dtype).view(groups, 1, -1, 1, 1)
    grad_q, grad_keys, grad_values = (torch.zeros_like(rows) for rows in (queries, keys, values))
    grad_factor = torch.zeros_like(per_head)
    for part in _groups(blocks, heads):
        weights = _weights(queries, keys, part, groups, window)
        outer = _take(outer_rows, part.query, groups)
        block_keys, block_values = _take(keys, part.key), _take(values, part.key)
        numerator = outer[..., :-1] * per_head
        _add(grad_values, part.key, weights.flatten(2, 3).transpose(-1, -2) @ numerator.flatten(2, 3))
        # weight 1 is e^0: the largest score of the row, or several that are equal
        top = weights == 1
        slope = (outer[..., :-1].flatten(2, 3) @ block_values.transpose(-1, -2)).view_as(weights)
        slope = slope.add_(outer[..., -1:]).mul_(weights)
        total = slope.sum(-1, keepdim=True)
        grad_factor += total.sum((1, 3), keepdim=True)
        slope = slope.sub_(top * (total / top.sum(-1, keepdim=True))).mul_(per_head)
        found = (slope.flatten(2, 3) @ block_keys).view(*weights.shape[:4], -1).mul_(scale)
        grad_q.index_copy_(1, part.query.flatten(), _by_head(found))
        block_queries = _take(queries, part.query, groups).flatten(2, 3)
        _add(grad_keys, part.key, slope.flatten(2, 3).transpose(-1, -2) @ block_queries)

    def of_tokens(rows: Tensor, like: Tensor) -> Tensor:
        return rows[:, :tokens].transpose(0, 1).to(like.dtype).reshape(like.shape)

    return (
        of_tokens(grad_q, q),
        of_tokens(grad_keys, k),
        of_tokens(grad_values, v),
        grad_past.to(past.dtype),
        grad_factor.flatten().to(factor.dtype),
        _of_rings(grad_keys, key_cache, tokens),
        _of_rings(grad_values, value_cache, tokens),
    )


def _gradient_to_past(
    grad: Tensor, y: Tensor, divisor: Tensor, starts: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """[dn, dz] (batch, length, heads, P + 1), zero outside documents."""
    numerator = grad.to(divisor.dtype) / divisor.unsqueeze(-1)
    if starts is not None and lengths is not None:
        valid = token_table(starts, lengths, *grad.shape[:2]).valid
        numerator = numerator.masked_fill_(~valid[..., None, None], 0)
    normaliser = -(numerator * y.to(divisor.dtype)).sum(-1, keepdim=True)
    return torch.cat([numerator, normaliser], dim=-1)


def _blocks(q: Tensor, position: Tensor | None, starts: Tensor | None, lengths: Tensor | None, window: int) -> _Blocks:
    batch_size, length = q.shape[:2]
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=q.device) * length
        lengths = torch.full_like(starts, length)
    tokens, size = batch_size * length, min(max(window, _SMALLEST_BLOCK), length)
    table = chunk_table(starts, lengths, tokens, size)
    query = torch.where(table.valid, table.token, tokens)
    document, used = table.document[:, None], table.valid[:, :1]
    first = table.token[:, :1] - starts[document]
    at = first + torch.arange(1 - window, size, device=q.device)  # in the document; negative before these tokens
    inside = (at >= 0) & (at < lengths[document]) & used
    if position is None:
        return _Blocks(query, torch.where(inside, starts[document] + at, tokens), inside)
    absolute = at + position[document]
    earlier = (at < 0) & (absolute >= 0) & used
    nothing = tokens + starts.shape[0] * window
    row = torch.where(earlier, tokens + document * window + absolute % window, nothing)
    return _Blocks(query, torch.where(inside, starts[document] + at, row), inside | earlier)


def _groups(blocks: _Blocks, heads: int) -> Iterator[_Blocks]:
    count = max(1, _SCORES // (heads * blocks.query.shape[1] * blocks.key.shape[1]))
    for begin in range(0, blocks.query.shape[0], count):
        yield _Blocks(*(table[begin : begin + count] for table in blocks))


def _weights(queries: Tensor, keys: Tensor, part: _Blocks, groups: int, window: int) -> Tensor:
    """e^{s - c} (G, T, r, C, S), zero where not visible."""
    block_queries = _take(queries, part.query, groups)
    scores = block_queries.flatten(2, 3) @ _take(keys, part.key).transpose(-1, -2)
    scores = scores.view(*block_queries.shape[:4], -1)
    size, span = scores.shape[-2:]
    offset = torch.arange(span, device=scores.device) - torch.arange(size, device=scores.device)[:, None]
    # Every query sees the last key, its own, one that is not there a row of zeros: no row is empty.
    own = offset == window - 1
    visible = own | ((offset >= 0) & (offset < window) & part.key_there[:, None])
    hide = torch.zeros(visible.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~visible, float("-inf"))
    scores = scores.add_(hide[:, None])
    return scores.sub_(scores.amax(-1, keepdim=True)).exp_()


def _rows(new: Tensor, cache: Tensor | None = None) -> Tensor:
    """(heads, rows, width), wide: the grid's tokens, the rings' slots behind them, a row of zeros last."""
    dtype = state_dtype(new.dtype)
    rows = new.flatten(0, 1).transpose(0, 1).to(dtype)
    if cache is not None:
        rows = torch.cat([rows, cache.transpose(0, 1).flatten(1, 2).to(dtype)], dim=1)
    return pad(rows, (0, 0, 0, 1))


def _take(rows: Tensor, index: Tensor, groups: int | None = None) -> Tensor:
    """Rows (T, n) of each head: (G, T, n, width), or (G, T, r, n, width) for r query heads in each of ``groups``."""
    found = rows.index_select(1, index.flatten()).view(rows.shape[0], *index.shape, rows.shape[-1])
    return found if groups is None else found.unflatten(0, (groups, -1)).transpose(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """(G, T, r, C, width) to (H, T C, width)."""
    return x.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _add(total: Tensor, index: Tensor, found: Tensor) -> None:
    """Adds (G, T, S, width) to the rows it came from. A key stands in at most two blocks, so that the order of
    the sum cannot matter."""
    total.index_add_(1, index.flatten(), found.flatten(1, 2))


def _of_rings(rows: Tensor, cache: Tensor | None, tokens: int) -> Tensor:
    """The gradient of rings (documents, G, window, width), in memory of its own."""
    if cache is None:
        return rows.new_empty(0)
    found = rows[:, tokens:-1].unflatten(1, (cache.shape[0], cache.shape[2])).transpose(0, 1)
    return found.to(cache.dtype, copy=True, memory_format=torch.contiguous_format)
