"""The transposed Vandermonde product by Triton kernels: see :mod:`seqmodels.ops.vandermonde.triton_products`."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.vandermonde.gradients import conjugate, state_gradient_to_z
from seqmodels.ops.vandermonde.triton_products import kernel, moments, refusal


def supports(z: Tensor, x: Tensor) -> str | None:
    return refusal(x)


def forward(z: Tensor, x: Tensor) -> Tensor:
    return moments(z, x, first=False)[0]


def backward(grad: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = kernel(z, conjugate(grad), x.shape[-1], 1.0)
    return state_gradient_to_z(z, grad, moments(z, x)[1]), grad_x
