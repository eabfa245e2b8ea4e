"""Sparse global attention on the CPU: a few blocks of queries at a time against the keys they can reach.

A block of S queries reaches at most S + w - 1 local keys and G chosen ones; they are gathered, and
PyTorch's CPU flash attention takes them with one additive mask: no memory grows with the square of
the length. The backward is written out, since the mask holds the biases and their gradient is wanted; it computes
the probabilities again from the saved log-sum-exp, and adds the gradients of overlapping blocks in float32.

Small blocks go through together, until their logits fill ``_LOGITS``: one by one, the calls would cost more than
the arithmetic. Blocks with equally many keys stand side by side, so that hardly any column is empty.

N blocks of a group, S queries and K keys of a block, H key heads, R query heads for each, P the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype

_LOGITS = 1 << 17  # logits of a group: 512 KB in float32, which stays in a core's cache
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _Group(NamedTuple):
    """N blocks. A slot without a token or a key repeats another of its block, whose numbers are finite where its
    own may not be (padding holds anything)."""

    token: Tensor  # (N, S) rows of the grid
    empty: Tensor | None  # (N, S) bool, slots without a token; None: there are none
    sources: Tensor  # (N, K) rows of the universe, local keys first
    local: int
    hidden: Tensor  # (N, S, K) bool


def supports(q: Tensor, *_: object) -> str | None:
    if q.device.type != "cpu":
        return f"its blocks are cut on the host; the tensors are on {q.device.type!r}"
    return None


def forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    token: Tensor,
    position: Tensor,
    local_source: Tensor,
    global_source: Tensor,
    global_position: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    compute = state_dtype(q.dtype)
    y = torch.zeros_like(q, memory_format=torch.contiguous_format)
    log_sum = torch.zeros(q.shape[:3], dtype=compute)
    heads, flat_q, out, sums = keys.shape[1], q.flatten(0, 1), y.flatten(0, 1), log_sum.flatten(0, 1)
    for group in _groups(token, position, local_source, global_source, global_position, window, q.shape[2]):
        queries = _by_head(flat_q, group, heads, compute)
        key, value = (_gathered(x, group, compute) for x in (keys, values))
        mask = _mask(bias, group, q.shape[2] // heads, compute)
        result, sum_ = _flash(queries, key, value, attn_mask=mask, scale=scale)
        _put(out, _by_token(result, group), group)
        _put(sums, _by_token(sum_.unsqueeze(-1), group).squeeze(-1), group)
    return y, log_sum


def backward(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    token: Tensor,
    position: Tensor,
    local_source: Tensor,
    global_source: Tensor,
    global_position: Tensor,
    window: int,
    scale: float,
    y: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, ...]:
    compute = state_dtype(q.dtype)
    heads = keys.shape[1]
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    grad_keys, grad_values = (torch.zeros(x.shape, dtype=compute) for x in (keys, values))
    grad_bias = torch.zeros_like(bias, dtype=compute)
    flat_q, flat_y, flat_grad, flat_sum = (x.flatten(0, 1) for x in (q, y, grad, log_sum))
    for group in _groups(token, position, local_source, global_source, global_position, window, q.shape[2]):
        queries, out, grad_out = (_by_head(x, group, heads, compute) for x in (flat_q, flat_y, flat_grad))
        if group.empty is not None:  # what repeats another query has no gradient
            grad_out.unflatten(2, (-1, group.token.shape[1])).masked_fill_(group.empty[:, None, None, :, None], 0)
        queries.mul_(scale)
        key, value = (_gathered(x, group, compute) for x in (keys, values))
        sum_ = _by_head(flat_sum.unsqueeze(-1), group, heads, compute)
        mask = _mask(bias, group, q.shape[2] // heads, compute)
        probability = (queries @ key.mT).add_(mask).sub_(sum_).exp_()
        sources = group.sources.flatten()
        grad_values.index_add_(0, sources, (probability.mT @ grad_out).transpose(1, 2).flatten(0, 1))
        mean = (grad_out * out).sum(-1, keepdim=True)
        grad_logits = (grad_out @ value.mT).sub_(mean).mul_(probability)
        if group.local < grad_logits.shape[-1]:
            chosen = grad_logits[..., group.local :].sum((1, 2))
            grad_bias.index_add_(0, group.sources[:, group.local :].flatten(), chosen.flatten())
        _put(grad_q.flatten(0, 1), _by_token((grad_logits @ key).mul_(scale), group), group)
        grad_keys.index_add_(0, sources, (grad_logits.mT @ queries).transpose(1, 2).flatten(0, 1))
    return grad_q, grad_keys.to(keys.dtype), grad_values.to(values.dtype), grad_bias.to(bias.dtype)


def _groups(
    token: Tensor,
    position: Tensor,
    local_source: Tensor,
    global_source: Tensor,
    global_position: Tensor,
    window: int,
    heads: int,
) -> Iterator[_Group]:
    reach = local_source.shape[1]
    place = position[:, :1] + 1 - window + torch.arange(reach)  # of the local keys
    empty = token < 0
    filled = empty.to(torch.uint8).argmin(1, keepdim=True)  # a slot with a token
    token, position = (torch.where(empty, x.gather(1, filled), x) for x in (token, position))
    # What no query of a block can see is left out; a block without tokens sees nothing.
    near = (local_source >= 0) & (place > position.amin(1, keepdim=True) - window) & (token[:, :1] >= 0)
    far = (global_source >= 0) & (global_position <= position.amax(1, keepdim=True) - window) & (token[:, :1] >= 0)
    seen, sources = torch.cat([near, far], 1), torch.cat([local_source, global_source], 1)
    sources = torch.where(seen, sources, sources.gather(1, near.to(torch.uint8).argmax(1, keepdim=True)))
    counts, order = seen.sum(1).sort(stable=True)
    counts = counts.tolist()
    begin, per_key = counts.count(0), heads * token.shape[1]
    while begin < len(counts):
        stop = begin + 1
        while stop < len(counts) and (stop + 1 - begin) * counts[stop] * per_key <= _LOGITS:
            stop += 1
        blocks = order[begin:stop]
        begin = stop
        columns = seen[blocks].any(0).nonzero().squeeze(1)
        local = int((columns < reach).sum())
        where_near, where_far = columns[:local], columns[local:] - reach
        here = position[blocks, :, None]
        distance = here - place[blocks][:, None, where_near]
        covered = global_position[blocks][:, None, where_far] > here - window
        hidden = torch.cat([(distance < 0) | (distance >= window), covered], 2)
        hidden |= ~seen[blocks][:, None, columns]
        gaps = empty[blocks]
        yield _Group(token[blocks], gaps if bool(gaps.any()) else None, sources[blocks][:, columns], local, hidden)


def _by_head(x: Tensor, group: _Group, heads: int, dtype: torch.dtype) -> Tensor:
    """The group's rows of (tokens, H R, P) as (N, H, R S, P), new memory."""
    rows = x.index_select(0, group.token.flatten()).to(dtype).view(*group.token.shape, heads, -1, x.shape[-1])
    return rows.permute(0, 2, 3, 1, 4).contiguous().flatten(2, 3)


def _by_token(x: Tensor, group: _Group) -> Tensor:
    """(N, H, R S, P) to (N S, H R, P)."""
    return x.unflatten(2, (-1, group.token.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _put(out: Tensor, x: Tensor, group: _Group) -> None:
    """``x`` (N S, ...) into the rows of ``out`` that are the group's."""
    rows, x = group.token.flatten(), x.to(out.dtype)
    if group.empty is not None:
        filled = (~group.empty.flatten()).nonzero().squeeze(1)
        rows, x = rows[filled], x[filled]
    out.index_copy_(0, rows, x)


def _gathered(x: Tensor, group: _Group, dtype: torch.dtype) -> Tensor:
    """(N, H, K, P) of the universe's rows."""
    rows = x.index_select(0, group.sources.flatten()).to(dtype)
    return rows.unflatten(0, group.sources.shape).transpose(1, 2).contiguous()


def _mask(bias: Tensor, group: _Group, repeat: int, dtype: torch.dtype) -> Tensor:
    """What is added to the logits, (N, 1, R S, K): 0 for local keys, the bias of chosen ones, minus infinity where
    hidden."""
    added = torch.zeros(group.hidden.shape, dtype=dtype)
    added[:, :, group.local :] = bias[group.sources[:, group.local :]].to(dtype)[:, None]
    return added.masked_fill_(group.hidden, float("-inf")).repeat(1, repeat, 1)[:, None]
