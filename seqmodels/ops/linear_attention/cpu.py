"""Linear attention by the C++ kernels of ``csrc/cpu/linear_attention*.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)
_MAX_RANKS = 64


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    if v.dtype not in _DTYPES:
        return f"the C++ kernels take float32 and bfloat16, not {v.dtype}"
    if v.shape[-3] > _MAX_RANKS:
        return f"the C++ kernels take up to {_MAX_RANKS} ranks, not {v.shape[-3]}"
    return None


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = contiguous(q, k, v, log_decay, past_weight, diagonal_weight, initial_state, starts, lengths)
    return torch.ops.seqmodels_cpu.linear_attention(*inputs, normalize, epsilon)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
    y: Tensor,
    final_state: Tensor,
    denominator: Tensor,
) -> tuple[Tensor, ...]:
    inputs = contiguous(
        grad_y, grad_final_state, q, k, v, log_decay, past_weight, diagonal_weight, initial_state, starts, lengths
    )
    return torch.ops.seqmodels_cpu.linear_attention_backward(*inputs, normalize, epsilon, y, denominator)
