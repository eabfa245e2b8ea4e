"""One token of sparse global attention in PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from seqmodels.ops.registration import state_dtype


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    recent_score: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    global_score: Tensor,
    global_position: Tensor,
    scale: float,
) -> Tensor:
    batch, heads, window = key.shape[:3]
    block, num_globals = recent_score.shape[1], global_score.shape[1]
    row = torch.arange(batch, device=q.device)
    slot, recent_slot = position % window, position % block
    key[row, :, slot] = k
    value[row, :, slot] = v
    recent_score[row, recent_slot] = score

    compute = state_dtype(q.dtype)
    queries = q.unflatten(1, (heads, -1)).to(compute)  # (B, H, R, P)
    in_ring = torch.arange(window, device=q.device) <= position[:, None]
    bias = torch.where(in_ring, 0.0, float("-inf")).to(compute)
    keys, values = key, value
    if num_globals:
        far = (global_position >= 0) & (global_position <= position[:, None] - window)
        far_bias = torch.where(far, logsigmoid(global_score), float("-inf"))
        bias = torch.cat([bias, far_bias.to(compute)], dim=1)
        keys, values = torch.cat([key, global_key], dim=2), torch.cat([value, global_value], dim=2)
    logits = queries @ keys.to(compute).mT * scale + bias[:, None, None]
    y = (logits.softmax(-1) @ values.to(compute)).flatten(1, 2).to(q.dtype)

    position += 1
    at_edge = position % block == 0
    if num_globals and (q.device.type != "cpu" or bool(at_edge.any())):
        _choose(key, value, position, recent_score, global_key, global_value, global_score, global_position, at_edge)
    recent_score.masked_fill_(at_edge[:, None], 0)
    return y


def _choose(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    recent_score: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    global_score: Tensor,
    global_position: Tensor,
    at_edge: Tensor,
) -> None:
    """Where a block ends, its tokens compete with the globals; elsewhere everything stays."""
    window, block, num_globals = key.shape[2], recent_score.shape[1], global_score.shape[1]
    place = position[:, None] - block + torch.arange(block, device=key.device)  # of the block's tokens, in order
    slot = (place % window)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    empty = torch.where(global_position < 0, float("-inf"), global_score)
    candidates = torch.cat([empty, recent_score], dim=1)
    # Stable, and globals are older than the block: where scores are equal the earlier token stays in front.
    best, order = candidates.sort(dim=1, descending=True, stable=True)
    best, order = best[:, :num_globals], order[:, :num_globals]
    chosen = torch.cat([global_position, place], dim=1).gather(1, order)
    filled = best > float("-inf")
    rows = order[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    for chosen_tokens, ring in ((global_key, key), (global_value, value)):
        merged = torch.cat([chosen_tokens, ring.gather(2, slot)], dim=2).gather(2, rows)
        merged = torch.where(filled[:, None, :, None], merged, 0)
        chosen_tokens.copy_(torch.where(at_edge[:, None, None, None], merged, chosen_tokens))
    global_score.copy_(torch.where(at_edge[:, None], torch.where(filled, best, 0), global_score))
    global_position.copy_(torch.where(at_edge[:, None], torch.where(filled, chosen, -1), global_position))
