"""The state of linear attention without queries, by the C++ kernels of ``csrc/cpu/linear_attention_state.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.linear_attention.cpu import contiguous
from seqmodels.ops.linear_attention.cpu import supports as supports_tokens


def supports(k: Tensor, v: Tensor, *rest: object) -> str | None:
    return supports_tokens(k, k, v)


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
    inputs = contiguous(k, v, log_decay, past_weight, initial_state, starts, lengths)
    return torch.ops.seqmodels_cpu.linear_attention_state(*inputs, normalize)


def backward(
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    inputs = contiguous(grad, k, v, log_decay, past_weight, initial_state, starts, lengths)
    return torch.ops.seqmodels_cpu.linear_attention_state_backward(*inputs, normalize)
