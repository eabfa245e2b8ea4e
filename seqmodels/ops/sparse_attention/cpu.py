"""Sparse global attention on the CPU: one block of queries at a time against the keys it can reach.

A block of S queries reaches at most S + w - 1 local keys and G chosen ones; they are gathered, and
PyTorch's CPU flash attention takes them with one additive mask: no memory grows with the square of
the length. The backward is written out, since the mask holds the biases and their gradient is wanted; it computes
the probabilities again from the saved log-sum-exp, and adds the gradients of overlapping blocks in float32.

H key heads, R query heads for each, P the width, n queries and K keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _Block(NamedTuple):
    queries: slice  # rows of the grid: the tokens of a block stand side by side
    sources: Tensor  # (K,) rows of the universe, local keys first
    local: int
    hidden: Tensor  # (n, K) bool


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
    heads = keys.shape[1]
    out, sums = y.flatten(0, 1), log_sum.flatten(0, 1)
    for block in _blocks(token, position, local_source, global_source, global_position, window):
        queries = _by_head(q.flatten(0, 1)[block.queries], heads, compute)
        key, value = (_gathered(x, block.sources, compute) for x in (keys, values))
        mask = _mask(bias, block, compute).repeat(queries.shape[1], 1)
        result, sum_ = _flash(queries.flatten(1, 2)[None], key[None], value[None], attn_mask=mask, scale=scale)
        out[block.queries] = _by_token(result[0], block).to(q.dtype)
        sums[block.queries] = sum_[0].unflatten(1, queries.shape[1:3]).flatten(0, 1).T
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
    for block in _blocks(token, position, local_source, global_source, global_position, window):
        queries, out, grad_out = (_by_head(x[block.queries], heads, compute) for x in (flat_q, flat_y, flat_grad))
        key, value = (_gathered(x, block.sources, compute) for x in (keys, values))
        sum_ = flat_sum[block.queries].T.unflatten(0, (heads, -1))
        probability = _logits(queries, key, bias, block, scale).sub_(sum_.unsqueeze(-1)).exp_().flatten(1, 2)
        grad_values.index_add_(0, block.sources, (probability.mT @ grad_out.flatten(1, 2)).transpose(0, 1))
        mean = (grad_out * out).sum(-1).flatten(1, 2)
        grad_logits = (grad_out.flatten(1, 2) @ value.mT).sub_(mean.unsqueeze(-1)).mul_(probability)
        if block.local < grad_logits.shape[-1]:
            grad_bias.index_add_(0, block.sources[block.local :], grad_logits[..., block.local :].sum((0, 1)))
        grad_q.flatten(0, 1)[block.queries] = _by_token((grad_logits @ key).mul_(scale), block).to(q.dtype)
        grad_key = (grad_logits.mT @ queries.flatten(1, 2)).mul_(scale)
        grad_keys.index_add_(0, block.sources, grad_key.transpose(0, 1))
    return grad_q, grad_keys.to(keys.dtype), grad_values.to(values.dtype), grad_bias.to(bias.dtype)


def _blocks(
    token: Tensor, position: Tensor, local_source: Tensor, global_source: Tensor, global_position: Tensor, window: int
) -> Iterator[_Block]:
    first_slot = (token >= 0).to(torch.uint8).argmax(1).tolist()
    counts = (token >= 0).sum(1).tolist()
    offset = torch.arange(local_source.shape[1])
    for t, (first, count) in enumerate(zip(first_slot, counts, strict=True)):
        if count == 0:
            continue
        start = int(token[t, first])
        here = position[t, first : first + count, None]
        place = position[t, 0] + 1 - window + offset  # of the local keys
        # What no query of this block can see is left out: keys before the first new query's window.
        kept = (local_source[t] >= 0) & (place > here[0] - window)
        place = place[kept]
        hidden = (place > here) | (place <= here - window)
        chosen = (global_source[t] >= 0) & (global_position[t] <= here[-1] - window)
        covered = global_position[t][chosen] > here - window
        sources = torch.cat([local_source[t][kept], global_source[t][chosen]])
        yield _Block(slice(start, start + count), sources, place.shape[0], torch.cat([hidden, covered], dim=1))


def _by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(n, H R, P) to (H, R, n, P)."""
    return x.to(dtype).unflatten(1, (heads, -1)).permute(1, 2, 0, 3).contiguous()


def _by_token(x: Tensor, block: _Block) -> Tensor:
    """(H, R n, P) to (n, H R, P)."""
    count = block.queries.stop - block.queries.start
    return x.unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2)


def _gathered(x: Tensor, sources: Tensor, dtype: torch.dtype) -> Tensor:
    """(H, K, P) of the universe's rows."""
    return x.index_select(0, sources).to(dtype).transpose(0, 1)


def _logits(queries: Tensor, key: Tensor, bias: Tensor, block: _Block, scale: float) -> Tensor:
    """(H, R, n, K), minus infinity where hidden."""
    logits = torch.bmm(queries.flatten(1, 2), key.mT).mul_(scale).unflatten(1, queries.shape[1:3])
    return logits.add_(_mask(bias, block, logits.dtype))


def _mask(bias: Tensor, block: _Block, dtype: torch.dtype) -> Tensor:
    """What is added to the logits, (n, K): 0 for local keys, the bias of chosen ones, minus infinity where hidden."""
    added = torch.zeros(block.hidden.shape, dtype=dtype)
    added[:, block.local :] = bias[block.sources[block.local :]].to(dtype)
    return added.masked_fill_(block.hidden, float("-inf"))
