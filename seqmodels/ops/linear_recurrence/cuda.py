"""Linear recurrence by the CUDA kernels of ``csrc/cuda/linear_recurrence.cu``.

Where rows and channels do not fill the device, time is cut into segments as the Triton kernels cut it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops import extension
from seqmodels.ops.linear_recurrence.boundaries import final_state_of, grad_initial_state, token_flags
from seqmodels.ops.linear_recurrence.segments import plan

_CHANNELS = 32  # of a block


def supports(decay: Tensor, x: Tensor, *rest: object) -> str | None:
    if x.dtype != torch.float32:
        return f"the CUDA kernels take float32; x is {x.dtype}"
    if x.shape[0] > 65535:
        return f"the CUDA kernels take at most 65535 rows; x has {x.shape[0]}"
    return extension.missing_cuda()


def _states(decay: Tensor, x: Tensor, state: Tensor | None, tables: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """h from contiguous inputs."""
    segment, count = plan(x, _blocks(x))
    carry = None
    if count > 1:
        products, ends = torch.ops.seqmodels_cuda.linear_recurrence_ends(decay, x, state, *tables, segment)
        carry = _states(products, ends, None, (None, None))
    return torch.ops.seqmodels_cuda.linear_recurrence(decay, x, state, *tables, carry, segment)


def _blocks(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[2] // _CHANNELS)


def forward(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    state = None if initial_state is None else initial_state.contiguous()
    h = _states(decay.contiguous(), x.contiguous(), state, token_flags(x, starts, lengths))
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
    decay, grad_h, grad_final = decay.contiguous(), grad_h.contiguous(), grad_final.contiguous()
    tables = token_flags(x, starts, lengths)
    segment, count = plan(x, _blocks(x))
    carry = None
    if count > 1:
        products, ends = torch.ops.seqmodels_cuda.linear_recurrence_backward_ends(
            grad_h, grad_final, decay, *tables, segment
        )
        carry = _states(products.flip(1), ends.flip(1), None, (None, None)).flip(1).contiguous()
    grad_decay, g = torch.ops.seqmodels_cuda.linear_recurrence_backward(
        grad_h, grad_final, decay, states, state, *tables, carry, segment
    )
    if decay.dim() != x.dim():  # one row a segment
        grad_decay = grad_decay.sum((0, 1))
    if state is None:
        return grad_decay, g, grad_h.new_empty(0)
    return grad_decay, g, grad_initial_state(decay, g, grad_final, starts, lengths)
