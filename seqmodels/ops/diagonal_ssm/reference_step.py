"""One token of a diagonal SSM: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(u_t: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor) -> Tensor:
    driven = b * u_t[:, :, None, None]
    real = decay[..., 0] * state[..., 0] - decay[..., 1] * state[..., 1] + driven[..., 0]
    imaginary = decay[..., 0] * state[..., 1] + decay[..., 1] * state[..., 0] + driven[..., 1]
    state.copy_(torch.stack((real, imaginary), -1))
    return (state[:, None] * c).sum((-2, -1)) + skip * u_t[:, None]
