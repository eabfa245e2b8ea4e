"""The Vandermonde product as it is written: every power, summed over states.

    kernel[r, h, l] = scale Re sum_n weight[r, h, n] e^{l z[h, n]}

R rows, H heads, N states, L times. Powers are formed in complex128.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(z: Tensor, weight: Tensor, length: int, scale: float) -> Tensor:
    times_L = torch.arange(length, device=z.device, dtype=torch.float64)
    z_HN = torch.view_as_complex(z.double().contiguous())
    power_HNL = torch.exp(z_HN[..., None] * times_L)
    weight_RHN = torch.view_as_complex(weight.contiguous())
    return scale * torch.einsum("rhn,hnl->rhl", weight_RHN, power_HNL.to(weight_RHN.dtype)).real.contiguous()
