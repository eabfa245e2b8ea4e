"""KV shift: each head's entry mixed with the same head's entries of the tokens just before.

A causal depthwise convolution whose weights are tied within a head, so it runs on the kernels of
:mod:`seqmodels.ops.short_conv` (C++, Triton and the others): one pass over keys and values together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.short_conv import short_conv, short_conv_step


def kv_shift(
    x: Tensor, mix: Tensor, *, initial_state: Tensor | None = None, layout: Layout | None = None
) -> tuple[Tensor, Tensor]:
    r"""For each head h, with W = ``mix.shape[1]`` and u the document's x:

    .. code-block:: text

        y[t, h] = sum_{j<W} mix[h, j] u[t - j, h]

    where u before the first token is ``initial_state``, zero when None (arXiv:2411.19574, section 3;
    W = 2 there). Column 0 of ``mix`` meets the current token, column 1 the previous one; the
    listing in the paper stores them the other way round.

    Args:
        x: (batch, length, heads, head_dim), not rotated; the last two dimensions contiguous. Keys and
            values go through one call, side by side.
        mix: (heads, W); may be float32 beside a low-precision x.
        initial_state: (documents, W - 1, heads, head_dim), the raw inputs before the first token, oldest
            first; float32 (float64 beside float64).
        layout: documents; nothing is mixed across their edges. None: one document a row.

    Returns:
        y of x's shape and dtype, and the final state: the last W - 1 raw inputs of each document.

    Raises:
        ValueError: shapes that do not fit together. TypeError: see :func:`~seqmodels.ops.short_conv.short_conv`.
    """
    heads, head_dim = _check("kv_shift", x, mix, 4)
    if initial_state is not None:
        initial_state = initial_state.flatten(-2)
    y, final_state = short_conv(x.flatten(-2), _per_channel(mix, head_dim), initial_state=initial_state, layout=layout)
    return y.unflatten(-1, (heads, head_dim)), final_state.unflatten(-1, (heads, head_dim))


@torch.no_grad()
def kv_shift_step(x_t: Tensor, mix: Tensor, state: Tensor) -> Tensor:
    """One token of :func:`kv_shift`; updates ``state`` in place, no gradient.

    Args:
        x_t: (batch, heads, head_dim). mix: (heads, W).
        state: (batch, W - 1, heads, head_dim), contiguous; float32 (float64 beside float64).

    Returns:
        y (batch, heads, head_dim) of x_t's dtype.
    """
    heads, head_dim = _check("kv_shift_step", x_t, mix, 3)
    y = short_conv_step(x_t.flatten(-2), _per_channel(mix, head_dim), None, state.flatten(-2))
    return y.unflatten(-1, (heads, head_dim))


def _per_channel(mix: Tensor, head_dim: int) -> Tensor:
    """(heads, W), newest first, as a convolution's (heads * head_dim, W), oldest first."""
    return mix.flip(-1).repeat_interleave(head_dim, dim=0)


def _check(owner: str, x: Tensor, mix: Tensor, rank: int) -> tuple[int, int]:
    if x.dim() != rank:
        expected = "(batch, length, heads, head_dim)" if rank == 4 else "(batch, heads, head_dim)"
        raise ValueError(f"{owner}: x has shape {tuple(x.shape)}; expected {expected}")
    heads, head_dim = x.shape[-2:]
    if mix.dim() != 2 or mix.shape[0] != heads or mix.shape[1] < 1:
        raise ValueError(
            f"{owner}: mix has shape {tuple(mix.shape)}; expected ({heads}, W), W >= 1 weights for each head of "
            f"x {tuple(x.shape)}"
        )
    return heads, head_dim
