"""The grouped linear map with every matrix applied to every row: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    chosen_NE = ((row >= starts) & (row < ends)).to(x.dtype)
    return torch.einsum("ne,neo->no", chosen_NE, torch.einsum("ni,eoi->neo", x, weight))
