"""Real channels, or complex ones as pairs of real components: one view for both."""

from __future__ import annotations

import torch
from torch import Tensor


def numbers_of(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` with complex entries where x (batch, length, channels[, 2]) holds pairs."""
    return torch.view_as_complex(tensor.contiguous()) if x.dim() == 4 else tensor


def components_of(numbers: Tensor) -> Tensor:
    """The inverse of :func:`numbers_of`."""
    return torch.view_as_real(numbers) if numbers.is_complex() else numbers
