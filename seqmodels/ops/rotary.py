"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split pairing."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import state_dtype


def token_positions(x: Tensor, seen: Tensor | None = None, layout: Layout | None = None) -> Tensor:
    """Absolute position of each token in its document: int64, (length,) or (batch, length).

    Args:
        x: any (batch, length, ...) tensor of the grid.
        seen: (documents,) int64, tokens of each document before these; None: zero.
        layout: documents, counted from their first real token; padding is at ``seen[0]`` or zero.
    """
    if layout is None:
        index = torch.arange(x.shape[1], device=x.device)
        return index if seen is None else seen[:, None] + index
    if seen is None:
        return layout.position
    return layout.position + seen[layout.document.clamp(min=0)]


def rotary_tables(
    position: Tensor, dim: int, *, base: float = 1e4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position * base^(-2 i / dim), i < dim / 2: (..., dim / 2) each.

    Computed in float32 (float64 for float64 ``dtype``) and returned so.
    """
    exact = state_dtype(dtype)
    exponents = torch.arange(0, dim, 2, device=position.device, dtype=exact) / -dim
    angle = position.unsqueeze(-1) * base**exponents
    return angle.cos(), angle.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 n entries of the last axis, n = ``cos.shape[-1]``; the rest passes.

    .. code-block:: text

        y[i]     = x[i] cos_i - x[i + n] sin_i          entry i is paired with i + n (half-split),
        y[i + n] = x[i + n] cos_i + x[i] sin_i          not with its neighbour

    Args:
        x: (batch, length, heads, head_dim), or (batch, heads, head_dim) for one token.
        cos, sin: (length, n) or (batch, length, n); (batch, n) for one token.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [
        torch.addcmul(first * cos, second, sin, value=-1).to(x.dtype),
        torch.addcmul(second * cos, first, sin).to(x.dtype),
    ]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)
