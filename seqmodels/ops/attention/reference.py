"""Softmax attention by its definition: one document at a time, every score in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype


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
    pinned: int = 0,
) -> tuple[Tensor, Tensor]:
    batch_size, length, heads, _ = q.shape
    exact = state_dtype(q.dtype)
    flat_q, flat_k, flat_v = (tensor.flatten(0, 1).to(exact) for tensor in (q, k, v))
    if starts is None or lengths is None:
        spans = [(row * length, length) for row in range(batch_size)]
    else:
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    y = torch.zeros_like(flat_q)
    log_sum = torch.zeros(flat_q.shape[:2], dtype=exact, device=q.device)
    for document, (start, count) in enumerate(spans):
        if count == 0:
            continue
        seen = 0 if position is None else int(position[document])
        keys, values = flat_k[start : start + count], flat_v[start : start + count]
        key_position = torch.arange(seen, seen + count, device=q.device)
        if key_cache is not None and value_cache is not None and position is not None:
            capacity = key_cache.shape[2]
            past = torch.arange(seen, device=q.device)
            past = past[(past < pinned) | (past >= seen - (capacity - pinned))]  # what is still there
            slots = torch.where(past < capacity, past, pinned + (past - pinned) % max(1, capacity - pinned))
            keys = torch.cat([key_cache[document][:, slots].transpose(0, 1).to(exact), keys])
            values = torch.cat([value_cache[document][:, slots].transpose(0, 1).to(exact), values])
            key_position = torch.cat([past, key_position])
        query_position = torch.arange(seen, seen + count, device=q.device)[:, None]
        distance = query_position - key_position
        visible = torch.ones_like(distance, dtype=torch.bool) if bidirectional else distance >= 0
        if window is not None:
            visible = visible & ((distance.abs() < window) | (key_position < pinned))
        repeats = heads // keys.shape[1]
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        scores = scale * torch.einsum("ihd,jhd->hij", flat_q[start : start + count], keys)
        scores = scores.masked_fill(~visible, float("-inf"))
        rows = torch.arange(start, start + count, device=q.device)
        y = y.index_copy(0, rows, torch.einsum("hij,jhd->ihd", scores.softmax(-1), values))
        log_sum[start : start + count] = scores.detach().logsumexp(-1).transpose(0, 1)
    return y.to(q.dtype).view_as(q).contiguous(), log_sum.view(batch_size, length, heads)
