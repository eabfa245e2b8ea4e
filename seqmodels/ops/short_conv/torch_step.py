"""One step of the short convolution in plain PyTorch; the state is updated in place."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x_t: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    weight_WC, x_BC = weight.to(state.dtype).T, x_t.to(state.dtype)
    z = torch.einsum("bwc,wc->bc", state, weight_WC[:-1]) + x_BC * weight_WC[-1]
    if bias is not None:
        z = z + bias.to(state.dtype)
    if state.shape[1] > 0:
        state.copy_(torch.cat([state[:, 1:], x_BC.unsqueeze(1)], dim=1))
    return (torch.nn.functional.silu(z) if silu else z).to(x_t.dtype).contiguous()
