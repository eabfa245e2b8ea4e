"""One token of a diagonal SSM: three kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(u_t: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor) -> Tensor:
    numbers = torch.view_as_complex(state)
    numbers.mul_(torch.view_as_complex(decay.contiguous()))
    state.addcmul_(b, u_t[:, :, None, None])
    return torch.einsum("bhmp,rhmp->brh", state, c).contiguous().addcmul_(skip, u_t[:, None])
