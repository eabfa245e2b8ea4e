"""RMSNorm, by its definition."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.registration import state_dtype


def forward(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.to(state_dtype(x.dtype))
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (weight.to(wide.dtype) * wide * scale).to(x.dtype).contiguous()
