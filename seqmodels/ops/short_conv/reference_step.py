"""One step of the short convolution: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x_t: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    window_BWC = torch.cat([state, x_t.to(state.dtype).unsqueeze(1)], dim=1)
    z = (window_BWC * weight.to(state.dtype).T).sum(dim=1)
    if bias is not None:
        z = z + bias.to(state.dtype)
    state.copy_(window_BWC[:, 1:])
    return (torch.nn.functional.silu(z) if silu else z).to(x_t.dtype).contiguous()
