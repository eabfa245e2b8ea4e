"""How the state of sparse global attention moves on by whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.attention import append_to_cache
from seqmodels.ops.sparse_attention.selection import block_tables
from seqmodels.ops.sparse_attention.state import SparseCache, all_scores, universe


def advance(cache: SparseCache, k: Tensor, v: Tensor, scores: Tensor, *, layout: Layout | None = None) -> SparseCache:
    """The state after the tokens of ``k``, ``v`` (batch, length, H, P) and ``scores`` (batch, length).

    New tensors, differentiable through keys, values and scores, nothing in place.
    """
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    block, num_globals = cache.recent_score.shape[1], cache.global_score.shape[1]
    ring_key, ring_value, position = append_to_cache(cache.key, cache.value, cache.position, k, v, layout=layout)
    recent = _recent(cache, scores, starts, lengths, position, block)
    if num_globals == 0:
        return cache._replace(key=ring_key, value=ring_value, position=position, recent_score=recent)
    tables = block_tables(scores.detach(), starts, lengths, cache, cache.key.shape[2], num_globals, block)
    source, place = tables.final_source, tables.final_position  # (D, G)
    filled = place >= 0

    def chosen(new: Tensor, ring: Tensor, before: Tensor) -> Tensor:
        keys = universe(new, ring, before)
        picked = keys.index_select(0, source.clamp_min(0).flatten()).unflatten(0, source.shape)
        picked = torch.where(filled[..., None, None], picked, 0)
        return picked.transpose(1, 2).to(before.dtype).contiguous()

    return SparseCache(
        ring_key, ring_value, position, recent,
        chosen(k, cache.key, cache.global_key),
        chosen(v, cache.value, cache.global_value),
        _chosen_scores(scores, cache, source, filled),
        place,
    )  # fmt: skip


def _chosen_scores(scores: Tensor, cache: SparseCache, source: Tensor, filled: Tensor) -> Tensor:
    picked = all_scores(scores, cache)[source.clamp_min(0)]
    return torch.where(filled, picked, 0).to(cache.global_score.dtype)


def _recent(
    cache: SparseCache, scores: Tensor, starts: Tensor | None, lengths: Tensor | None, position: Tensor, block: int
) -> Tensor:
    """Scores of the positions from S * (n // S) to n - 1; the slots beyond are zero."""
    batch_size, length = scores.shape
    if starts is None:
        starts = torch.arange(batch_size, device=scores.device) * length
    slots = torch.arange(block, device=scores.device)
    place = position[:, None] // block * block + slots
    token = place - cache.position[:, None]
    source = (starts[:, None] + token).clamp(0, batch_size * length - 1)
    fresh = scores.flatten()[source].to(cache.recent_score.dtype)
    return torch.where(place < position[:, None], torch.where(token >= 0, fresh, cache.recent_score), 0)
