"""The two-layer perceptron between mixers, plain or gated."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.channel.base import TokenwiseChannel
from seqmodels.mixers.base import check_positive
from seqmodels.ops.swiglu import swiglu
from seqmodels.ops.token_linear import apply_linear
from seqmodels.state import EmptyState


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _squared_relu,
    "silu": F.silu,
}


class MLP(TokenwiseChannel):
    """y = W_out a(W_in x), or gated: y = W_out (a(W_gate x) * W_up x).

    x and y are (..., d_model). A gated layer keeps W_gate and W_up in one matrix, ``in_proj``:
    rows [0, d_hidden) are the gate.

    Args:
        d_model: width.
        d_hidden: inner width; by default ``expansion * d_model``, rounded up to a multiple of
            ``multiple_of``.
        expansion: used only where ``d_hidden`` is not given.
        multiple_of: granularity of the derived inner width.
        activation: "gelu" (exact), "gelu_tanh", "relu", "relu2" (relu squared) or "silu".
        gated: multiply by a second projection ("gelu" with it is GeGLU).
        bias: biases of both projections.

    Raises:
        ValueError: for sizes below 1, an expansion that is not positive, or an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_hidden: int | None = None,
        expansion: float = 4.0,
        multiple_of: int = 1,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model)
        name = type(self).__name__
        if activation not in ACTIVATIONS:
            raise ValueError(f"{name}: unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        if d_hidden is None:
            check_positive(name, multiple_of=multiple_of)
            if not expansion > 0 or not math.isfinite(expansion):
                raise ValueError(f"{name}: expansion is {expansion!r}; expected a positive number")
            # A float such as 8/3 times 3 lands a hair above the integer; do not round that up.
            exact = expansion * d_model / multiple_of
            d_hidden = multiple_of * max(1, math.ceil(exact - 1e-9 * exact))
        check_positive(name, d_hidden=d_hidden)
        self.d_hidden = d_hidden
        self.activation = activation
        self.gated = gated
        self.in_proj = nn.Linear(d_model, (2 if gated else 1) * d_hidden, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_hidden, d_model, bias=bias, device=device, dtype=dtype)

    def transform(self, x: Tensor) -> Tensor:
        return self._map(x, lambda linear, value: linear(value))

    @torch.no_grad()
    def step(self, x_t: Tensor, state: EmptyState) -> Tensor:
        return self._map(x_t, apply_linear)

    def _map(self, x: Tensor, apply: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        hidden = apply(self.in_proj, x)
        activate = ACTIVATIONS[self.activation]
        if self.gated and self.activation == "silu":
            hidden = swiglu(hidden)
        elif self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activate(gate) * up
        else:
            hidden = activate(hidden)
        return apply(self.out_proj, hidden)

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_hidden={self.d_hidden}, activation={self.activation!r}, gated={self.gated}"
