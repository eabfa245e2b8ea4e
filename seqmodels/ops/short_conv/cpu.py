"""Short convolution by the C++ kernels of ``csrc/cpu/short_conv.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> str | None:
    if any(tensor is not None and tensor.dtype not in _DTYPES for tensor in (x, weight, bias)):
        return f"the C++ kernels take float32 and bfloat16; x is {x.dtype}, weight {weight.dtype}"
    return None


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return torch.ops.seqmodels_cpu.short_conv(
        _dense_channels(x), weight.contiguous(), _contiguous(bias), _contiguous(initial_state), _contiguous(starts),
        _contiguous(lengths), silu,
    )  # fmt: skip


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_weight_and_bias, grad_initial_state = torch.ops.seqmodels_cpu.short_conv_backward(
        _dense_channels(grad_y), grad_final_state.contiguous(), _dense_channels(x), weight.contiguous(),
        _contiguous(bias), _contiguous(initial_state), _contiguous(starts), _contiguous(lengths), silu,
    )  # fmt: skip
    empty = grad_y.new_empty(0)
    grad_weight = grad_weight_and_bias[:-1].T.to(weight.dtype, memory_format=torch.contiguous_format)
    grad_bias = empty if bias is None else grad_weight_and_bias[-1].to(bias.dtype, copy=True)
    return grad_x, grad_weight, grad_bias, empty if initial_state is None else grad_initial_state
