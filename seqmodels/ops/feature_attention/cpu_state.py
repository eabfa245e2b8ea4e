"""The state of feature attention without queries, by the C++ kernels of ``csrc/cpu/linear_attention_state.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.cpu import contiguous, inside, supports, through_weight

__all__ = ["backward", "forward", "supports"]


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
    tokens = contiguous(k.unsqueeze(2), v.unsqueeze(2))
    rest = contiguous(key_weight, log_decay, initial_state, initial_log_scale, starts, lengths)
    return torch.ops.seqmodels_cpu.feature_state(*tokens, *rest, feature_map, normalize)


def backward(
    grad: Tensor,
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
    log_scale: Tensor,
) -> tuple[Tensor, ...]:
    tokens = contiguous(grad, k.unsqueeze(2), v.unsqueeze(2))
    rest = contiguous(key_weight, log_decay, initial_state, initial_log_scale, starts, lengths)
    du, grad_v, grad_decay, grad_initial = torch.ops.seqmodels_cpu.feature_state_backward(
        *tokens, *rest, feature_map, normalize, log_scale
    )
    grad_k, grad_weight = through_weight(du.squeeze(2), inside(k, starts, lengths), key_weight)
    return grad_k, grad_v.squeeze(2), grad_weight, grad_decay, grad_initial
