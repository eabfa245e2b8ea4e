"""SwiGLU's elementwise part by the C++ kernels of ``csrc/cpu/swiglu.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(hidden: Tensor) -> str | None:
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels take float32 and bfloat16; hidden is {hidden.dtype}"
    return None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def forward(hidden: Tensor) -> Tensor:
    return torch.ops.seqmodels_cpu.swiglu(_rows(hidden)).view(*hidden.shape[:-1], hidden.shape[-1] // 2)


def backward(grad_y: Tensor, hidden: Tensor) -> tuple[Tensor]:
    return (torch.ops.seqmodels_cpu.swiglu_backward(_rows(grad_y), _rows(hidden)).view(hidden.shape),)
