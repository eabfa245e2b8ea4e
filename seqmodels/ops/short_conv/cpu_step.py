"""One step of the short convolution by the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)


def supports(x_t: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> str | None:
    if any(tensor is not None and tensor.dtype not in _DTYPES for tensor in (x_t, weight, bias)):
        return f"the C++ kernels take float32 and bfloat16; x_t is {x_t.dtype}, weight {weight.dtype}"
    return None


def forward(x_t: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    x = x_t.contiguous().unsqueeze(1)
    return torch.ops.seqmodels_cpu.short_conv_step(x, weight.contiguous(), bias, state, silu)
