"""Linear recurrence by the CUDA kernels of ``csrc/cuda/linear_recurrence.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops import extension
from seqmodels.ops.linear_recurrence.boundaries import final_state_of, grad_initial_state, token_flags


def supports(decay: Tensor, x: Tensor, *rest: object) -> str | None:
    if x.dtype != torch.float32:
        return f"the CUDA kernels take float32; x is {x.dtype}"
    if x.shape[0] > 65535:
        return f"the CUDA kernels take at most 65535 rows; x has {x.shape[0]}"
    return extension.missing_cuda()


def forward(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    state = None if initial_state is None else initial_state.contiguous()
    tables = token_flags(x, starts, lengths)
    h = torch.ops.seqmodels_cuda.linear_recurrence(decay.contiguous(), x.contiguous(), state, *tables)
    return h, final_state_of(h, state, starts, lengths)


def backward(
    grad_h: Tensor,
    grad_final: Tensor,
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    states: Tensor,
    final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    state = None if initial_state is None else initial_state.contiguous()
    grad_final = grad_final.contiguous()
    tables = token_flags(x, starts, lengths)
    grad_decay, g = torch.ops.seqmodels_cuda.linear_recurrence_backward(
        grad_h.contiguous(), grad_final, decay.contiguous(), states, state, *tables
    )
    if decay.dim() != x.dim():  # one row a row of the grid
        grad_decay = grad_decay.sum(0)
    if state is None:
        return grad_decay, g, grad_h.new_empty(0)
    return grad_decay, g, grad_initial_state(decay, g, grad_final, starts, lengths)
