"""What sparse global attention keeps between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.ops.attention import empty_cache
from seqmodels.ops.registration import state_dtype


class SparseCache(NamedTuple):
    """The state of each document (D of them) after n tokens; window w, block S, G globals, H key heads, width P.

    Attributes:
        key, value: (D, H, w, P), a ring: slot p mod w holds position p.
        position: (D,) int64, n.
        recent_score: (D, S), scores of the current block's tokens, slot p mod S; zero in slots not yet reached.
        global_key, global_value: (D, H, G, P): the best G tokens among positions below S * (n // S), the best
            first, earlier before later where scores are equal. Empty slots are zero.
        global_score: (D, G); zero in empty slots.
        global_position: (D, G) int64; -1 in empty slots.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    recent_score: Tensor
    global_key: Tensor
    global_value: Tensor
    global_score: Tensor
    global_position: Tensor


def empty(
    documents: int,
    heads: int,
    head_dim: int,
    *,
    window: int,
    num_globals: int,
    block: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SparseCache:
    """The state before the first token; scores in float32 (float64 beside float64 keys)."""
    scores = state_dtype(dtype or torch.get_default_dtype())

    def tokens(count: int) -> Tensor:
        return empty_cache(documents, heads, count, head_dim, device=device, dtype=dtype)

    return SparseCache(
        key=tokens(window),
        value=tokens(window),
        position=torch.zeros(documents, dtype=torch.int64, device=device),
        recent_score=torch.zeros(documents, block, device=device, dtype=scores),
        global_key=tokens(num_globals),
        global_value=tokens(num_globals),
        global_score=torch.zeros(documents, num_globals, device=device, dtype=scores),
        global_position=torch.full((documents, num_globals), -1, dtype=torch.int64, device=device),
    )


def universe(new: Tensor, ring: Tensor | None, chosen: Tensor | None) -> Tensor:
    """Every key there is, one a row: the new tokens, the rings, the globals; (keys, H, P) in new's dtype."""
    parts = [new.flatten(0, 1)]
    for cache in (ring, chosen):
        if cache is not None:
            parts.append(cache.transpose(1, 2).flatten(0, 1).to(new.dtype))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def all_scores(scores: Tensor, cache: SparseCache | None) -> Tensor:
    """The score of every key of :func:`universe`, (keys,). The current block's tokens are in the ring too."""
    if cache is None:
        return scores.flatten()
    window, block = cache.key.shape[2], cache.recent_score.shape[1]
    slots = torch.arange(window, device=scores.device)
    last = cache.position[:, None] - 1
    place = last - (last - slots) % window  # position of each ring slot
    in_block = place >= cache.position[:, None] // block * block
    ring = torch.where(in_block, cache.recent_score.gather(1, place.clamp_min(0) % block), 0)
    parts = (scores, ring, cache.global_score)
    return torch.cat([part.flatten().to(scores.dtype) for part in parts])
