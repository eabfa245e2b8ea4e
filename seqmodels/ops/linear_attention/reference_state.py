"""The state of linear attention without queries, from the definition in ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.linear_attention import reference


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
    _, state, _ = reference.forward(
        torch.zeros_like(k),
        k,
        v,
        log_decay,
        past_weight,
        None,
        initial_state,
        starts,
        lengths,
        normalize,
        1.0,
        chunk_size,
    )
    return state
