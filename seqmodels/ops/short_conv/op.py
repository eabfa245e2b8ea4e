"""The public functions of the short convolution: equation, checks, casts and dispatch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator, cast_inputs, state_dtype

_PACKAGE = "seqmodels.ops.short_conv"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Activation = Literal["silu"] | None


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: Activation = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Causal depthwise convolution over time, for each channel c and width W:

    .. code-block:: text

        z[t, c] = bias[c] + sum_{w=0}^{W-1} weight[c, w] u[t - (W-1) + w, c]
        y = z, or z * sigmoid(z) with activation="silu"

    where u is the document's x, and before its first token the W-1 rows of ``initial_state``
    (zeros when None). ``weight[:, W-1]`` meets the current token, as in ``torch.nn.Conv1d``.

    Args:
        x: (batch, length, channels). Channels should be contiguous; batch and time may be strided.
        weight: (channels, W), W >= 1. May be float32 beside a low-precision x.
        bias: (channels,) or None.
        initial_state: (documents, W-1, channels), the inputs before the first token, oldest first;
            float32 (float64 beside float64 inputs).
        activation: None or ``"silu"``, fused.
        layout: documents; one state row for each. None: one document a row.

    Returns:
        y of x's shape and dtype, zero outside documents, and the final state: the last W-1 inputs
        of each document, in the shape and dtype of ``initial_state``. Sums are taken in float32
        (float64).

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        TypeError: a dtype that is not floating-point, or float64 beside another dtype.
    """
    (x,) = cast_inputs(x)
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(
            f"short_conv: x has shape {tuple(x.shape)}; expected (batch, length, channels) with at least one token. "
            "For one token at a time call short_conv_step."
        )
    _check("short_conv", x, weight, bias, activation)
    if layout is not None and (layout.batch_size, layout.length) != x.shape[:2]:
        raise ValueError(
            f"short_conv: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"x is {tuple(x.shape[:2])} (batch, length)"
        )
    if initial_state is not None:
        documents = x.shape[0] if layout is None else layout.num_documents
        _check_state("short_conv", "initial_state", initial_state, documents, x, weight)
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    return _operator(x, weight, bias, initial_state, starts, lengths, activation == "silu")


@torch.no_grad()
def short_conv_step(
    x_t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: Activation = None,
) -> Tensor:
    """One token of :func:`short_conv`; updates ``state`` in place, no gradient.

    Args:
        x_t: (batch, channels). weight: (channels, W). bias: (channels,) or None.
        state: (batch, W-1, channels), oldest first, contiguous; float32 (float64 beside float64
            inputs).

    Returns:
        y (batch, channels) of x_t's dtype.
    """
    (x_t,) = cast_inputs(x_t)
    if x_t.dim() != 2:
        raise ValueError(f"short_conv_step: x_t has shape {tuple(x_t.shape)}; expected (batch, channels)")
    _check("short_conv_step", x_t, weight, bias, activation)
    _check_state("short_conv_step", "state", state, x_t.shape[0], x_t, weight)
    if not state.is_contiguous():
        raise ValueError("short_conv_step: state is not contiguous and cannot be updated in place; clone it")
    return _step_operator(x_t, weight, bias, state, activation == "silu")


def _check(owner: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"{owner}: weight has shape {tuple(weight.shape)}; expected ({channels}, width) for x {tuple(x.shape)}. "
            "An nn.Conv1d's weight (channels, 1, width) needs .squeeze(1)."
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{owner}: bias has shape {tuple(bias.shape)}; expected ({channels},)")
    if activation not in (None, "silu"):
        raise ValueError(f"{owner}: activation is {activation!r}; expected None or 'silu'")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(
                f"{owner}: {name} is {tensor.dtype} beside x of {x.dtype}; expected float32, bfloat16 or float16, "
                "or float64 throughout"
            )


def _check_state(owner: str, name: str, state: Tensor, rows: int, x: Tensor, weight: Tensor) -> None:
    expected = (rows, weight.shape[1] - 1, x.shape[-1])
    if state.shape != expected or state.dtype != state_dtype(x.dtype):
        raise ValueError(
            f"{owner}: {name} is {tuple(state.shape)} {state.dtype}; expected {expected} {state_dtype(x.dtype)} "
            "(documents, width - 1, channels)"
        )


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, starts: Tensor | None,
          lengths: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    documents = x.shape[0] if starts is None else starts.shape[0]
    state = x.new_empty((documents, weight.shape[1] - 1, x.shape[2]), dtype=state_dtype(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


_operator = Operator(
    "short_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? starts, Tensor? lengths, bool silu",
    outputs=2,
    fake=_fake,
    modules={name: f"{_PACKAGE}.{name}" for name in ("reference", "torch", "cpu", "triton", "cuda")},
    differentiable=(0, 1, 2, 3),
)
_step_operator = Operator(
    "short_conv_step",
    "Tensor x_t, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu",
    outputs=1,
    fake=lambda x_t, *rest: torch.empty_like(x_t, memory_format=torch.contiguous_format),
    modules={name: f"{_PACKAGE}.{name}_step" for name in ("reference", "torch", "cpu", "triton", "cuda")},
)
