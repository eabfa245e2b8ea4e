"""The Vandermonde product in plain PyTorch: see :mod:`seqmodels.ops.vandermonde.torch_products`."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.vandermonde.gradients import kernel_gradients
from seqmodels.ops.vandermonde.torch_products import kernel, moments


def forward(z: Tensor, weight: Tensor, length: int, scale: float) -> Tensor:
    return kernel(z, weight, length, scale)


def backward(grad: Tensor, z: Tensor, weight: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor]:
    return kernel_gradients(z, weight, scale, moments(z, grad))
