"""SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch

from seqmodels.channel.mlp import MLP


class SwiGLU(MLP):
    """y = W_out (silu(W_gate x) * W_up x), without biases by default.

    x and y are (..., d_model). The default inner width, 8/3 d_model rounded up to a multiple
    of 64, gives about the parameters of a plain MLP of expansion 4.

    Args:
        d_model: width.
        d_hidden: inner width; by default ``expansion * d_model`` rounded up to ``multiple_of``.
        expansion: used only where ``d_hidden`` is not given.
        multiple_of: granularity of the derived inner width.
        bias: biases of all projections.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_hidden: int | None = None,
        expansion: float = 8 / 3,
        multiple_of: int = 64,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_hidden=d_hidden,
            expansion=expansion,
            multiple_of=multiple_of,
            activation="silu",
            gated=True,
            bias=bias,
            device=device,
            dtype=dtype,
        )
