"""SwiGLU's elementwise part, by its definition."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.registration import state_dtype


def forward(hidden: Tensor) -> Tensor:
    gate, up = hidden.to(state_dtype(hidden.dtype)).chunk(2, dim=-1)
    return (gate / (1 + (-gate).exp()) * up).to(hidden.dtype)
