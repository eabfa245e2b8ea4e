"""Linear recurrence by the C++ kernels of ``csrc/cpu/linear_recurrence.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(decay: Tensor, x: Tensor, *rest: object) -> str | None:
    return None if x.dtype == torch.float32 else f"the C++ kernels take float32; x is {x.dtype}"


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    documents = (_contiguous(initial_state), _contiguous(starts), _contiguous(lengths))
    return torch.ops.seqmodels_cpu.linear_recurrence(decay.contiguous(), x.contiguous(), *documents)


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
    documents = (_contiguous(initial_state), _contiguous(starts), _contiguous(lengths))
    grad_decay, grad_x, grad_initial = torch.ops.seqmodels_cpu.linear_recurrence_backward(
        grad_h.contiguous(), grad_final.contiguous(), decay.contiguous(), states, *documents
    )
    if decay.dim() != x.dim():  # one row a document
        grad_decay = grad_decay.sum(0)
    return grad_decay, grad_x, grad_h.new_empty(0) if initial_state is None else grad_initial
