"""A softmax window joined to a linear past, by its definition: one document at a time, every score in memory.

For one head, with c_i the largest score of the window (written out, since the past is not scaled by it):

    p_ij = e^{s_ij - c_i},  s_ij = scale q_i . k_j                       i - window < j <= i
    y_i  = (f sum_j p_ij v_j + n_i) / (f sum_j p_ij + z_i + tiny)         past_i = [n_i, z_i]
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype

TINY = 1e-30  # a window and a past of weight zero give zero


def joined(
    q_IHd: Tensor, k_JHd: Tensor, v_JHP: Tensor, past_IHP: Tensor, factor_H: Tensor, visible_IJ: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y (I, H, P) and the divisor (I, H) for queries I over keys J."""
    scores = (scale * torch.einsum("ihd,jhd->ihj", q_IHd, k_JHd)).masked_fill(~visible_IJ[:, None], float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = factor_H[:, None] * (scores - largest).exp()
    divisor = weights.sum(-1) + past_IHP[..., -1] + TINY
    y = (torch.einsum("ihj,jhp->ihp", weights, v_JHP) + past_IHP[..., :-1]) / divisor[..., None]
    return y, divisor


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
    exact = state_dtype(q.dtype)
    repeats = heads // k.shape[2]
    flat_q, flat_k, flat_v, flat_past = (tensor.flatten(0, 1).to(exact) for tensor in (q, k, v, past))
    factor = factor.to(exact)
    if starts is None or lengths is None:
        spans = [(row * length, length) for row in range(batch_size)]
    else:
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    y = torch.zeros((batch_size * length, heads, v.shape[-1]), dtype=exact, device=q.device)
    divisor = torch.ones(y.shape[:2], dtype=exact, device=q.device)
    for document, (start, count) in enumerate(spans):
        if count == 0:
            continue
        rows = torch.arange(start, start + count, device=q.device)
        keys, values, seen = flat_k[rows], flat_v[rows], 0
        if key_cache is not None and value_cache is not None and position is not None:
            seen = int(position[document])
            slots = torch.arange(max(0, seen - window), seen, device=q.device) % window
            keys = torch.cat([key_cache[document][:, slots].transpose(0, 1).to(exact), keys])
            values = torch.cat([value_cache[document][:, slots].transpose(0, 1).to(exact), values])
        at = torch.arange(keys.shape[0], device=q.device) - (keys.shape[0] - count)
        query_at = torch.arange(count, device=q.device)[:, None]
        visible = (at <= query_at) & (at > query_at - window)
        found = joined(
            flat_q[rows],
            keys.repeat_interleave(repeats, 1),
            values.repeat_interleave(repeats, 1),
            flat_past[rows],
            factor,
            visible,
            scale,
        )
        y, divisor = y.index_copy(0, rows, found[0]), divisor.index_copy(0, rows, found[1])
    shape = (batch_size, length, heads)
    return y.to(q.dtype).view(*shape, -1), divisor.view(shape)
