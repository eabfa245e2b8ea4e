"""One token of the linear recurrence: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(decay: Tensor, x_t: Tensor, state: Tensor) -> None:
    if x_t.dim() == 2:
        state.copy_(decay * state + x_t)
        return
    real = decay[..., 0] * state[..., 0] - decay[..., 1] * state[..., 1] + x_t[..., 0]
    imaginary = decay[..., 0] * state[..., 1] + decay[..., 1] * state[..., 0] + x_t[..., 1]
    state.copy_(torch.stack((real, imaginary), -1))
