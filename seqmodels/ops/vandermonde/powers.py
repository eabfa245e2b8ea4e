"""Powers e^{l z} at integer times, with phases that stay exact however large they grow."""

from __future__ import annotations

import torch
from torch import Tensor


def powers(z: Tensor, times: Tensor) -> Tensor:
    """e^{l z} for every l in ``times``, computed in float64: (*times.shape, *z.shape).

    Args:
        z: (..., 2), real and imaginary part last.
        times: integers, any shape.

    Returns:
        (*times.shape, ..., 2) in z's dtype, differentiable in z.
    """
    exponent = z.double() * times.double().view(*times.shape, *([1] * z.dim()))
    size = torch.exp(exponent[..., 0])
    result = torch.stack((size * torch.cos(exponent[..., 1]), size * torch.sin(exponent[..., 1])), -1)
    return result.to(z.dtype)
