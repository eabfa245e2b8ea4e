"""RMSNorm by the C++ kernels of ``csrc/cpu/rms_norm.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(x: Tensor, *rest: object) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels take float32 and bfloat16; x is {x.dtype}"
    return None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def forward(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.ops.seqmodels_cpu.rms_norm(_rows(x), weight.contiguous(), epsilon).view(x.shape)


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    grad_x, units = torch.ops.seqmodels_cpu.rms_norm_backward(_rows(grad_y), _rows(x), weight.contiguous(), epsilon)
    return grad_x.view(x.shape), units.sum(0).to(weight.dtype)
