"""Causal attention over few tokens by the C++ kernels of ``csrc/cpu/short_attention.cpp``.

All scores of a head fit in a core's cache there, so a row of the batch is a few products of small matrices. PyTorch's
CPU flash attention, made for long sequences, takes about twice as long for them.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

LONGEST, WIDEST = 512, 256  # tokens and head width up to which it was measured to be the faster way
# Elsewhere, and without AVX2, PyTorch's own products are.
VECTORS = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def fits(q: Tensor) -> bool:
    """Whether the kernels are for queries (batch, length, heads, head_dim) like these."""
    return VECTORS and q.dtype == torch.float32 and 1 <= q.shape[1] <= LONGEST and 1 <= q.shape[3] <= WIDEST


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    scale: float,
    bidirectional: bool,
    pinned: int,
) -> str | None:
    if bidirectional or window is not None or starts is not None or key_cache is not None:
        return "the C++ kernels are for causal rows without documents, windows and caches"
    if not fits(q):
        return (
            f"the C++ kernels are for x86 with AVX2, float32, 1 to {LONGEST} tokens and heads up to {WIDEST} wide; "
            f"q is {tuple(q.shape)} {q.dtype}"
        )
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    scale: float,
    bidirectional: bool,
    pinned: int,
) -> tuple[Tensor, Tensor]:
    return torch.ops.seqmodels_cpu.short_attention(_dense(q), _dense(k), _dense(v), scale)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    scale: float,
    bidirectional: bool,
    pinned: int,
    y: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, ...]:
    tensors = (_dense(x) for x in (grad, q, k, v))
    found = torch.ops.seqmodels_cpu.short_attention_backward(*tensors, log_sum, scale)
    return (*found, q.new_empty(0), q.new_empty(0))


def _dense(x: Tensor) -> Tensor:
    """Gaps are welcome anywhere but in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
