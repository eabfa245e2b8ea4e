"""Sparse global attention query by query: the definition that the others are judged by.

For the query at position t, block b = t // S, with window w:

    local   = {j : t - w < j <= t},   global = the best G by (score, earliest) of {j < b S}, without local
    y_t = sum_j softmax_j(scale q_t . k_j + [j is global] log sigmoid(score_j)) v_j   over both

Past tokens are those that the state holds: the ring, and the globals chosen so far.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from seqmodels.ops.registration import state_dtype
from seqmodels.ops.sparse_attention.state import SparseCache


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    cache: SparseCache | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
    num_globals: int,
    block: int,
    scale: float,
) -> Tensor:
    batch_size, length, heads, _ = q.shape
    compute = state_dtype(q.dtype)
    if starts is None or lengths is None:
        spans = [(row * length, length) for row in range(batch_size)]
    else:
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    queries, keys, values = (x.flatten(0, 1).to(compute) for x in (q, k, v))
    repeat = heads // k.shape[2]
    rows, found = [], []
    for document, (start, count) in enumerate(spans):
        tokens = _past(cache, document, window, block, compute)  # position -> (key, value, score)
        fixed = {} if cache is None else _fixed(cache, document, compute)
        seen = 0 if cache is None else int(cache.position[document])
        for index in range(count):
            flat, t = start + index, seen + index
            tokens[t] = (keys[flat], values[flat], scores.flatten()[flat])
            known = fixed | {p: entry for p, entry in tokens.items() if p >= seen // block * block}
            candidates = [p for p in known if p < t // block * block]
            chosen = sorted(candidates, key=lambda p: (-float(known[p][2].detach()), p))[:num_globals]
            local = [p for p in range(max(0, t - window + 1), t + 1)]
            chosen = [p for p in chosen if p <= t - window]
            entries = [tokens[p] for p in local] + [known[p] for p in chosen]
            bias = torch.stack([torch.zeros_like(scores.flatten()[0])] * len(local) + [known[p][2] for p in chosen])
            bias = torch.cat([bias[: len(local)], logsigmoid(bias[len(local) :])]).to(compute)
            key_KHP = torch.stack([entry[0] for entry in entries]).repeat_interleave(repeat, dim=1)
            value_KHP = torch.stack([entry[1] for entry in entries]).repeat_interleave(repeat, dim=1)
            logits_HK = torch.einsum("hp,khp->hk", queries[flat], key_KHP) * scale + bias
            rows.append(torch.einsum("hk,khp->hp", logits_HK.softmax(-1), value_KHP))
            found.append(flat)
    y = torch.zeros_like(queries)
    if rows:
        y = y.index_copy(0, torch.tensor(found, device=q.device), torch.stack(rows))
    return y.view(q.shape).to(q.dtype)


def _past(cache: SparseCache | None, document: int, window: int, block: int, dtype: torch.dtype) -> dict:
    """The tokens in the ring; scores are known for the current block alone (the others are never chosen anew)."""
    if cache is None:
        return {}
    seen = int(cache.position[document])
    return {
        p: (
            cache.key[document, :, p % window].to(dtype),
            cache.value[document, :, p % window].to(dtype),
            cache.recent_score[document, p % block],
        )
        for p in range(max(0, seen - window), seen)
    }


def _fixed(cache: SparseCache, document: int, dtype: torch.dtype) -> dict:
    """The tokens chosen among earlier blocks."""
    return {
        position: (
            cache.global_key[document, :, slot].to(dtype),
            cache.global_value[document, :, slot].to(dtype),
            cache.global_score[document, slot],
        )
        for slot, position in enumerate(cache.global_position[document].tolist())
        if position >= 0
    }
