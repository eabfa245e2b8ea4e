"""The output map of the S4 block."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.channel.base import TokenwiseChannel
from seqmodels.mixers.gating import Gate, GatedActivation


class GLU(TokenwiseChannel):
    """y = GLU(W dropout(GELU(x)) + b), W: d_model -> 2 d_model; GLU(a, b) = a * sigmoid(b).

    What follows the convolution in the S4 block. In a model ``s4d>glu`` is one block: with
    ``dropout: 0.1``, ``dropout_tied: true`` there and here it is conv + D, dropout, GELU, dropout, Linear,
    GLU, dropout, and the residual sum.

    Args:
        d_model: width.
        gate: "full_glu", or S5's "half_glu1" (g * sigmoid(W g + b), g = dropout(GELU(x))) and "half_glu2"
            (x * sigmoid(W g + b)).
        dropout: probability after the GELU, in training.
        dropout_tied: one mask for all positions of a sequence.

    Raises:
        ValueError: an unknown gate, a probability outside [0, 1).
    """

    residual_outputs = ("activation.proj.weight",)

    def __init__(
        self,
        d_model: int,
        *,
        gate: Gate = "full_glu",
        dropout: float = 0.0,
        dropout_tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model)
        self.activation = GatedActivation(
            d_model, gate, dropout=dropout, dropout_tied=dropout_tied, device=device, dtype=dtype
        )

    def transform(self, x: Tensor) -> Tensor:
        return self.activation(x)
