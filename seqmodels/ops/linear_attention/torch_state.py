"""The state of linear attention without queries, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmodels.ops.documents import chunk_table
from seqmodels.ops.linear_attention.torch import running_decay, states, to_chunks


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    chunk_size: int,
) -> Tensor:
    batch_size, length, ranks, _, _ = v.shape
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    tokens = max(1, min(chunk_size // ranks, length))
    table = None if starts is None or lengths is None else chunk_table(starts, lengths, batch_size * length, tokens)
    values = v.to(compute)
    if normalize:
        values = pad(values, (0, 1), value=1.0)
    decay = None if log_decay is None else running_decay(to_chunks(log_decay, tokens, table))
    keys, values = (to_chunks(x, tokens, table) for x in (k.to(compute), values))
    if past_weight is not None:  # in chunks, where padding is zero whatever stood there
        values = values * to_chunks(past_weight, tokens, table)[:, :, None, :, None]
    _, final = states(keys, values, decay, initial_state, table, batch_size)
    return final.contiguous()
