"""One token of the linear recurrence: two kernels, no temporary."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(decay: Tensor, x_t: Tensor, state: Tensor) -> None:
    if x_t.dim() == 2:
        state.mul_(decay).add_(x_t)
    else:
        numbers = torch.view_as_complex(state)
        numbers.mul_(torch.view_as_complex(decay.contiguous())).add_(torch.view_as_complex(x_t.contiguous()))
