"""What the blocks' kernels compute, query by query, from the tables that name their keys: the definition of the op
behind ``sparse_attention`` once the choice is made. Checks of one kernel alone are judged by it; the layer and
its laws by ``reference``, which shares nothing with the tables.

With c the position of a block's slot 0, offset o of its local keys is the position c + 1 - window + o.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.registration import state_dtype


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
    queries, keys, values = (x.to(compute) for x in (q.flatten(0, 1), keys, values))
    repeat = q.shape[2] // keys.shape[1]
    rows, sums, found = [], [], []
    tables = zip(*(x.tolist() for x in (token, position, local_source, global_source, global_position)), strict=True)
    for tokens, places, near, far, far_places in tables:
        for flat, here in zip(tokens, places, strict=True):
            if flat < 0:
                continue
            first = places[0] + 1 - window
            local = [row for place, row in enumerate(near, first) if row >= 0 and here - window < place <= here]
            chosen = [row for place, row in zip(far_places, far, strict=True) if row >= 0 and place <= here - window]
            weights = torch.cat([bias.new_zeros(len(local)), bias[chosen]]).to(compute)
            key_KHP, value_KHP = (x[local + chosen].repeat_interleave(repeat, dim=1) for x in (keys, values))
            logits_HK = torch.einsum("hp,khp->hk", queries[flat], key_KHP) * scale + weights
            rows.append(torch.einsum("hk,khp->hp", logits_HK.softmax(-1), value_KHP))
            sums.append(logits_HK.logsumexp(-1))
            found.append(flat)
    y, log_sum = torch.zeros_like(queries), queries.new_zeros(queries.shape[:2])
    if rows:
        index = torch.tensor(found, device=q.device)
        y, log_sum = y.index_copy(0, index, torch.stack(rows)), log_sum.index_copy(0, index, torch.stack(sums))
    return y.view(q.shape).to(q.dtype), log_sum.view(q.shape[:3])
