"""SwiGLU's elementwise part in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def forward(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return silu(gate) * up
