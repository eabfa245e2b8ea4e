"""The state of feature attention without queries, from the definition in ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.reference import keys_into_state, project, tokens_of, with_ones


def forward(
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    normalize: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    B, L, H, _ = v.shape
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    table, documents = tokens_of(starts, lengths, B, L, v.device)
    k, v = (torch.where(table.valid[:, :, None, None], x.to(compute), 0) for x in (k, v))
    values = with_ones(v) if normalize else v
    if log_decay is not None:
        log_decay = torch.where(table.valid[..., None], log_decay, 0)
    keys = keys_into_state(
        project(k, key_weight, H), values, log_decay, initial_state, initial_log_scale, feature_map, table,
        documents,
    )  # fmt: skip
    return keys.final.contiguous(), keys.log_scale
