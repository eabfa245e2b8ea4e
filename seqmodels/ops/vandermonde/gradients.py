"""Gradients of both Vandermonde products from two sums over time.

With S0 = sum_l g[l] e^{l z} and S1 = sum_l l g[l] e^{l z} (the moments of g),

    kernel = scale Re(weight E):  grad weight = scale conj(S0(grad)),  grad z = scale conj(sum_r weight S1(grad))
    state  = sum_l x[l] E[l]:     grad x = Re(conj(grad) E),           grad z = sum_r grad conj(S1(x))

where the gradient to a complex number is the pair (dL/dRe, dL/dIm).
"""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_gradients(z: Tensor, weight: Tensor, scale: float, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(grad z, grad weight) from the moments (rows, heads, states, 2) of the gradient to the kernel."""
    zeroth, first = moments
    (real, imaginary), (first_real, first_imaginary) = weight.unbind(-1), first.unbind(-1)
    grad_real = (real * first_real - imaginary * first_imaginary).sum(0)
    grad_imaginary = (real * first_imaginary + imaginary * first_real).sum(0)
    grad_z = torch.stack((scale * grad_real, -scale * grad_imaginary), -1)
    return grad_z.to(z.dtype), zeroth * zeroth.new_tensor([scale, -scale])


def state_gradient_to_z(z: Tensor, grad: Tensor, first: Tensor) -> Tensor:
    """grad z from the gradient to the states and the first moment of x, both (rows, heads, states, 2)."""
    (real, imaginary), (first_real, first_imaginary) = grad.unbind(-1), first.unbind(-1)
    grad_real = (real * first_real + imaginary * first_imaginary).sum(0)
    grad_imaginary = (imaginary * first_real - real * first_imaginary).sum(0)
    return torch.stack((grad_real, grad_imaginary), -1).to(z.dtype)


def conjugate(pairs: Tensor) -> Tensor:
    """(Re, -Im)."""
    return torch.stack((pairs[..., 0], -pairs[..., 1]), -1)
