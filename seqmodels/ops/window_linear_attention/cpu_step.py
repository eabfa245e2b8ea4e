"""One decode token by the C++ kernel of ``csrc/cpu/attention_step.cpp``: only filled slots are read."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernel takes float32 and bfloat16; the ring is {q.dtype}"
    if v.shape[-1] != q.shape[-1]:
        return f"the C++ kernel takes values as wide as queries, not {v.shape[-1]} beside {q.shape[-1]}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    factor: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    q, k, v, past, factor = (tensor.contiguous() for tensor in (q, k, v, past, factor))
    return torch.ops.seqmodels_cpu.window_linear_attention_step(
        q, k, v, past, factor, key_cache, value_cache, position, scale
    )
