"""The public functions of a decode step's linear maps: checks, casts and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqmodels.ops.registration import Operator, cast_inputs

_PACKAGE = "seqmodels.ops.token_linear"


@torch.no_grad()
def token_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias for one token of each sequence; no gradient.

    ``torch.nn.functional.linear``, with a kernel of its own for few rows on the CPU.

    Args:
        x: (batch, in). weight: (out, in). bias: (out,) or None. All of one dtype (under autocast,
            autocast's).

    Returns:
        (batch, out).

    Raises:
        ValueError: shapes that do not fit together. TypeError: mixed dtypes.
    """
    x, weight, *rest = cast_inputs(x, weight, *(() if bias is None else (bias,)))
    bias = rest[0] if rest else None
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"token_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (batch, in) and (out, in)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"token_linear: bias is {tuple(bias.shape)}; expected {tuple(weight.shape[:1])}")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"token_linear: x is {x.dtype}, weight {weight.dtype}, bias {None if bias is None else bias.dtype}; "
            "expected one dtype"
        )
    return _operator(x, weight, bias)


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)`` for one token of each sequence, by :func:`token_linear` where that is the same.

    It is not where ``linear`` is another kind of module (an adapter, a quantised layer, a
    parametrised one) or carries hooks: then the module is called.
    """
    hooks = linear._forward_hooks or linear._forward_pre_hooks
    if type(linear) is not nn.Linear or hooks:
        return linear(x)
    return token_linear(x, linear.weight, linear.bias)


_operator = Operator(
    "token_linear",
    "Tensor x, Tensor weight, Tensor? bias",
    outputs=1,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    modules={name: f"{_PACKAGE}.{name}" for name in ("reference", "torch", "cpu")},
)
