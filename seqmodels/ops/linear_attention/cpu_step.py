"""One decode step of linear attention by the C++ kernel of ``csrc/cpu/linear_attention_step.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.linear_attention.cpu import contiguous, supports

__all__ = ["forward", "supports"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    state: Tensor,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    token = contiguous(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
    weights = contiguous(log_decay, past_weight, diagonal_weight)
    return torch.ops.seqmodels_cpu.linear_attention_step(*token, *weights, state, normalize, epsilon).squeeze(1)
