"""The public function of the long convolution: equation, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator
from seqmodels.ops.short_conv.states import final_state_of

_PACKAGE = "seqmodels.ops.long_conv"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    reverse_kernel: Tensor | None = None,
    initial_state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Depthwise convolution over time with kernels of any length, for each row r and channel c:

    .. code-block:: text

        y[t, r, c] = sum_{j >= 0} kernel[r, c, j] x[t - j, c]  +  sum_{j >= 0} reverse_kernel[r, c, j] x[t + 1 + j, c]

    where x is the document's (tokens of other documents are never seen), and before its first token
    the rows of ``initial_state`` (zeros without it, and before its oldest row). The second sum is there with
    ``reverse_kernel`` only: bidirectional, as in S4's block.

    Computed by FFT in float32 (float64 beside float64 inputs), also under autocast. A diagonal SSM carries
    its state differently: add :func:`seqmodels.ops.vandermonde.diagonal_response` to y, and take the last
    state from :func:`seqmodels.ops.vandermonde.diagonal_final_state`.

    Section 3 of Gu, Goel and Ré, "Efficiently modeling long sequences with structured state spaces".

    Args:
        x: (batch, length, channels).
        kernel: (channels, K) or (rows, channels, K), K >= 1; taps from ``length`` (plus the initial state's
            rows) on are never used. float32 (float64 beside float64 inputs).
        reverse_kernel: kernel's shape but for K, or None.
        initial_state: (documents, P, channels), the P inputs before each document, oldest first.
        layout: documents. None: one document a row.

    Returns:
        y (batch, length, channels) or, for a kernel with rows, (batch, length, rows, channels), in x's dtype
        and zero outside documents; and the final state, the last P inputs of each document in the shape of
        ``initial_state`` (None without it).

    Raises:
        ValueError: shapes that do not fit together; an initial state beside a reverse kernel.
        TypeError: a dtype that is not floating-point, or float64 beside another dtype.
    """
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(
            f"long_conv: x has shape {tuple(x.shape)}; expected (batch, length, channels) with at least one token"
        )
    channels = x.shape[2]
    if kernel.dim() not in (2, 3) or kernel.shape[-2] != channels or kernel.shape[-1] < 1:
        raise ValueError(
            f"long_conv: kernel has shape {tuple(kernel.shape)}; expected ({channels}, taps) or (rows, {channels}, "
            f"taps) for x {tuple(x.shape)}"
        )
    if reverse_kernel is not None and (reverse_kernel.shape[:-1] != kernel.shape[:-1] or reverse_kernel.shape[-1] < 1):
        raise ValueError(
            f"long_conv: reverse_kernel has shape {tuple(reverse_kernel.shape)}; expected {tuple(kernel.shape[:-1])} "
            "and at least one tap"
        )
    if layout is not None and (layout.batch_size, layout.length) != x.shape[:2]:
        raise ValueError(
            f"long_conv: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"x is {tuple(x.shape[:2])} (batch, length)"
        )
    documents = x.shape[0] if layout is None else layout.num_documents
    if initial_state is not None:
        if reverse_kernel is not None:
            raise ValueError("long_conv: a bidirectional convolution has no initial state; pass one or the other")
        if initial_state.dim() != 3 or (initial_state.shape[0], initial_state.shape[2]) != (documents, channels):
            raise ValueError(
                f"long_conv: initial_state has shape {tuple(initial_state.shape)}; expected ({documents}, inputs, "
                f"{channels})"
            )
    for name, tensor in (
        ("x", x), ("kernel", kernel), ("reverse_kernel", reverse_kernel), ("initial_state", initial_state)
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(
                f"long_conv: {name} is {tensor.dtype} beside x of {x.dtype}; expected float32, bfloat16 or float16, "
                "or float64 throughout"
            )
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    rows = kernel if kernel.dim() == 3 else kernel.unsqueeze(0)
    reverse = reverse_kernel if reverse_kernel is None or kernel.dim() == 3 else reverse_kernel.unsqueeze(0)
    y = _operator(x, rows, reverse, initial_state, starts, lengths)
    final_state = None if initial_state is None else _final_state(x, initial_state, layout)
    return y if kernel.dim() == 3 else y.squeeze(2), final_state


def _final_state(x: Tensor, initial_state: Tensor, layout: Layout | None) -> Tensor:
    if layout is not None:
        return final_state_of(x, initial_state, layout.starts, layout.lengths)
    inputs = torch.cat([initial_state, x.to(initial_state.dtype)], 1)
    return inputs[:, inputs.shape[1] - initial_state.shape[1] :].clone()


def _fake(
    x: Tensor,
    kernel: Tensor,
    reverse_kernel: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], kernel.shape[0], x.shape[2]))


_operator = Operator(
    "long_conv",
    "Tensor x, Tensor kernel, Tensor? reverse_kernel, Tensor? initial_state, Tensor? starts, Tensor? lengths",
    outputs=1,
    fake=_fake,
    modules={name: f"{_PACKAGE}.{name}" for name in ("reference", "torch")},
    differentiable=(0, 1, 2, 3),
)
