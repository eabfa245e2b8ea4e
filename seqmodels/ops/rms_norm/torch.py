"""RMSNorm by PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    # Contiguous, as the fake op promises: PyTorch keeps the strides of x.
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon).contiguous()
