"""Sparse global attention in PyTorch operations, on any device: gathered blocks through SDPA.

Blocks of queries become a batch: each has its own S + w - 1 local and G chosen keys, gathered.
Memory is (S + w - 1 + G) / S times that of the keys. The bias of a chosen key is two more entries of
its key, met by ones in the query, so that the fused kernels see only a mask and still give the
bias its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from seqmodels.ops.registration import state_dtype

_ALIGNMENT = 8  # entries; fused attention wants head widths in multiples of it


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
    blocks, size = token.shape
    heads, width = keys.shape[1:]
    repeat = q.shape[2] // heads
    extra = 2 + -(width + 2) % _ALIGNMENT
    # Where there is no token a row of zeros is read: padding may hold NaN, which a mask does not stop.
    q_rows, keys, values, bias = (
        pad(x, (0, 0) * (x.dim() - 1) + (0, 1)) for x in (q.flatten(0, 1), keys, values, bias)
    )
    queries = q_rows[torch.where(token < 0, q_rows.shape[0] - 1, token)]  # (T, S, H R, P)
    queries = pad(pad(queries, (0, 2), value=1.0), (0, extra - 2))
    queries = queries.unflatten(2, (heads, repeat)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    sources = torch.cat([local_source, global_source], dim=1)
    row = torch.where(sources < 0, keys.shape[0] - 1, sources)
    key = keys[row].transpose(1, 2)
    bias_TK = torch.cat([torch.zeros_like(local_source, dtype=bias.dtype), bias[row[:, local_source.shape[1] :]]], 1)
    # In two pieces, so that a bfloat16 key loses none of it.
    high = (bias_TK / scale).to(key.dtype)
    low = (bias_TK / scale - high).to(key.dtype)
    pieces = torch.stack([high, low], dim=-1)[:, None].expand(-1, heads, -1, -1)
    key = torch.cat([key, pieces, key.new_zeros(1).expand(*key.shape[:3], extra - 2)], dim=-1)
    value = pad(values[row].transpose(1, 2), (0, extra))
    offset = torch.arange(local_source.shape[1], device=q.device)
    place = torch.cat([position[:, :1] + 1 - window + offset, global_position], dim=1)[:, None]  # (T, 1, K)
    here = position[:, :, None]
    in_window = (place > here - window) & (place <= here)
    is_local = torch.arange(place.shape[2], device=q.device) < local_source.shape[1]
    visible = torch.where(is_local, in_window, place <= here - window) & (sources >= 0)[:, None]
    visible = visible | (token < 0)[:, :, None]  # a slot without a token: anything finite
    mask = visible[:, None].repeat(1, 1, repeat, 1)
    y = scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scale)[..., :width]
    y = y.unflatten(2, (repeat, size)).permute(0, 3, 1, 2, 4).reshape(blocks * size, heads * repeat, width)
    target = torch.where(token < 0, q.shape[0] * q.shape[1], token).flatten()  # one row more, for the empty slots
    out = q.new_zeros(q.shape[0] * q.shape[1] + 1, *q.shape[2:]).index_copy(0, target, y.to(q.dtype))
    return out[:-1].view(q.shape).clone(), q.new_zeros(q.shape[:3], dtype=state_dtype(q.dtype))
