"""The public functions of the linear recurrence: equation, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator

_PACKAGE = "seqmodels.ops.linear_recurrence"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_recurrence(
    decay: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Elementwise recurrence over time, for each channel c of a document:

    .. code-block:: text

        h[t, c] = decay[t, c] h[t-1, c] + x[t, c],   h[-1] = initial_state (zeros when None)

    Complex channels are real tensors with a trailing dimension of 2 (real part, imaginary part),
    which ``torch.view_as_complex`` would read in place. Whether channels are complex is seen from
    x: three dimensions are real, four are complex.

    Args:
        decay: (channels,) or (channels, 2), the same at every time; or x's shape, one for each
            token. Any value, also of modulus above 1.
        x: (batch, length, channels) or (batch, length, channels, 2).
        initial_state: (documents, channels) or (documents, channels, 2).
        layout: documents; one state row for each. None: one document a row.

    Returns:
        The states h in x's shape, zero outside documents, and each document's last state (its
        initial state where it has no token). float64 if x is float64, else float32: the
        recurrence is computed, and its states kept, in float32 whatever autocast says.

    Gradients are those of the real components; for complex channels dL/dh is the pair
    (dL/dRe h, dL/dIm h), so that with g[t] = dL/dh[t] + conj(decay[t+1]) g[t+1] the gradients are
    g[t] to x and g[t] conj(h[t-1]) to decay.

    Section 6 of Smith, Warrington and Linderman, "Simplified state space layers for sequence
    modeling", uses it with complex decays.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: a dtype that is not floating-point, or float64 beside another dtype.
    """
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[3] != 2) or x.shape[1] < 1:
        raise ValueError(
            f"linear_recurrence: x has shape {tuple(x.shape)}; expected (batch, length, channels), or "
            "(batch, length, channels, 2) for complex channels, with at least one token. For one token at a "
            "time call linear_recurrence_step."
        )
    if decay.shape != x.shape and decay.shape != x.shape[2:]:
        raise ValueError(
            f"linear_recurrence: decay has shape {tuple(decay.shape)}; expected {tuple(x.shape[2:])} (constant) or "
            f"{tuple(x.shape)} (one for each token)"
        )
    if layout is not None and (layout.batch_size, layout.length) != x.shape[:2]:
        raise ValueError(
            f"linear_recurrence: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"x is {tuple(x.shape[:2])} (batch, length)"
        )
    documents = x.shape[0] if layout is None else layout.num_documents
    if initial_state is not None and initial_state.shape != (documents, *x.shape[2:]):
        raise ValueError(
            f"linear_recurrence: initial_state has shape {tuple(initial_state.shape)}; expected "
            f"{(documents, *x.shape[2:])} (documents, channels...)"
        )
    decay, x, initial_state = _working("linear_recurrence", decay=decay, x=x, initial_state=initial_state)
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    return _operator(decay, x, initial_state, starts, lengths)


@torch.no_grad()
def linear_recurrence_step(decay: Tensor, x_t: Tensor, state: Tensor) -> Tensor:
    """One token of :func:`linear_recurrence`: state <- decay state + x_t, in place; no gradient.

    Args:
        decay: (channels,), (channels, 2), or x_t's shape.
        x_t: (batch, channels), or (batch, channels, 2) for complex channels.
        state: x_t's shape; float32 (float64 beside float64 inputs). It is what the step returns.
    """
    if x_t.dim() not in (2, 3) or (x_t.dim() == 3 and x_t.shape[2] != 2):
        raise ValueError(
            f"linear_recurrence_step: x_t has shape {tuple(x_t.shape)}; expected (batch, channels), or "
            "(batch, channels, 2) for complex channels"
        )
    if decay.shape != x_t.shape and decay.shape != x_t.shape[1:]:
        raise ValueError(
            f"linear_recurrence_step: decay has shape {tuple(decay.shape)}; expected {tuple(x_t.shape[1:])} or "
            f"{tuple(x_t.shape)}"
        )
    decay, x_t, _ = _working("linear_recurrence_step", decay=decay, x=x_t, initial_state=None)
    if state.shape != x_t.shape or state.dtype != x_t.dtype:
        raise ValueError(
            f"linear_recurrence_step: state is {tuple(state.shape)} {state.dtype}; expected {tuple(x_t.shape)} "
            f"{x_t.dtype}"
        )
    _step_operator(decay, x_t, state)
    return state


def _working(
    owner: str, *, decay: Tensor, x: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in float32, or all in float64."""
    for name, tensor in (("decay", decay), ("x", x), ("initial_state", initial_state)):
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(
                f"{owner}: {name} is {tensor.dtype} beside x of {x.dtype}; expected float32, bfloat16 or float16, "
                "or float64 throughout; complex values as pairs in a trailing dimension (torch.view_as_real)"
            )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return decay.to(dtype), x.to(dtype), None if initial_state is None else initial_state.to(dtype)


def _fake(
    decay: Tensor, x: Tensor, initial_state: Tensor | None, starts: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    documents = x.shape[0] if starts is None else starts.shape[0]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty((documents, *x.shape[2:]))


_operator = Operator(
    "linear_recurrence",
    "Tensor decay, Tensor x, Tensor? initial_state, Tensor? starts, Tensor? lengths",
    outputs=2,
    fake=_fake,
    modules={name: f"{_PACKAGE}.{name}" for name in ("reference", "torch", "cpu", "triton", "cuda")},
    differentiable=(0, 1, 2),
    keep_outputs=True,
)
_step_operator = Operator(
    "linear_recurrence_step",
    "Tensor decay, Tensor x_t, Tensor(a!) state",
    outputs=0,
    fake=lambda *args: None,
    modules={name: f"{_PACKAGE}.{name}_step" for name in ("reference", "torch")},
)
