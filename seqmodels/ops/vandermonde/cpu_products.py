"""Vandermonde products by the C++ kernels of ``csrc/cpu/vandermonde.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor


def refusal(values: Tensor) -> str | None:
    return None if values.dtype == torch.float32 else f"the C++ kernels take float32; the values are {values.dtype}"


def kernel(z: Tensor, weight: Tensor, length: int, scale: float) -> Tensor:
    return torch.ops.seqmodels_cpu.vandermonde(z.double().contiguous(), weight.contiguous(), length, scale)


def moments(z: Tensor, g: Tensor, *, first: bool = True) -> tuple[Tensor, Tensor]:
    return torch.ops.seqmodels_cpu.vandermonde_moments(z.double().contiguous(), g.contiguous(), first)
