"""One decode step of feature attention by the C++ kernel of ``csrc/cpu/linear_attention_step.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.cpu import contiguous, supports

__all__ = ["forward", "supports"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    log_scale: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    token = contiguous(*(x[:, None, None] for x in (q, k, v)))
    rest = contiguous(query_weight, key_weight, log_decay)
    y = torch.ops.seqmodels_cpu.feature_attention_step(*token, *rest, state, log_scale, feature_map, normalize, epsilon)
    return y[:, 0, 0]
