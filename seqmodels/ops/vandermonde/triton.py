"""The Vandermonde product by Triton kernels: see :mod:`seqmodels.ops.vandermonde.triton_products`."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.vandermonde.gradients import kernel_gradients
from seqmodels.ops.vandermonde.triton_products import kernel, moments, refusal


def supports(z: Tensor, weight: Tensor, *rest: object) -> str | None:
    return refusal(weight)


def forward(z: Tensor, weight: Tensor, length: int, scale: float) -> Tensor:
    return kernel(z, weight, length, scale)


def backward(grad: Tensor, z: Tensor, weight: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor]:
    return kernel_gradients(z, weight, scale, moments(z, grad))
