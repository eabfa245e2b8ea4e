"""Gated activations that follow a state-space layer: GLU, and the half-GLUs of S5."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gate = Literal["full_glu", "half_glu1", "half_glu2"]
GATES = ("full_glu", "half_glu1", "half_glu2")


class GatedActivation(nn.Module):
    r"""With g = dropout(GELU(y)) and s the logistic function:

    .. code-block:: text

        full_glu    (W_1 g + b_1) * s(W_2 g + b_2)        one Linear, H -> 2H
        half_glu1   g * s(W g + b)
        half_glu2   y * s(W g + b)

    Args:
        d_model: H.
        gate: one of the three.
        dropout: probability, in training.
        dropout_tied: one mask for all positions of a row (the second-last dimension).
    """

    def __init__(
        self,
        d_model: int,
        gate: Gate,
        *,
        dropout: float = 0.0,
        dropout_tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"unknown gate {gate!r}; expected one of {', '.join(GATES)}")
        if not 0 <= dropout < 1 or not math.isfinite(dropout):
            raise ValueError(f"dropout is {dropout!r}; expected 0 <= dropout < 1")
        self.gate, self.dropout, self.dropout_tied = gate, float(dropout), dropout_tied
        width = 2 * d_model if gate == "full_glu" else d_model
        self.proj = nn.Linear(d_model, width, device=device, dtype=dtype)

    def forward(self, y: Tensor) -> Tensor:
        g = self._dropped(F.gelu(y))
        if self.gate == "full_glu":
            return F.glu(self.proj(g))
        return (g if self.gate == "half_glu1" else y) * torch.sigmoid(self.proj(g))

    def _dropped(self, g: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return g
        if not self.dropout_tied:
            return F.dropout(g, self.dropout)
        return g * F.dropout(torch.ones_like(g[..., :1, :]), self.dropout)

    def extra_repr(self) -> str:
        return f"{self.gate}, dropout={self.dropout}, tied={self.dropout_tied}"
