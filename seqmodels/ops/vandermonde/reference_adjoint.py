"""The transposed Vandermonde product as it is written.

state[r, h, n] = sum_l x[r, h, l] e^{l z[h, n]}
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(z: Tensor, x: Tensor) -> Tensor:
    times_L = torch.arange(x.shape[-1], device=z.device, dtype=torch.float64)
    z_HN = torch.view_as_complex(z.double().contiguous())
    power_HNL = torch.exp(z_HN[..., None] * times_L)
    numbers = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    state_RHN = torch.einsum("rhl,hnl->rhn", x.to(numbers), power_HNL.to(numbers))
    return torch.view_as_real(state_RHN.contiguous())
