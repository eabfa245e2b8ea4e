"""One decode token by the C++ kernel: only filled slots are read."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(q: Tensor, *_: object) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernel takes float32 and bfloat16; the cache is {q.dtype}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    window: int | None,
    scale: float,
    pinned: int = 0,
) -> Tensor:
    capacity = key_cache.shape[2]
    if (window is None or capacity < window + pinned) and int(position.amax()) >= capacity:
        raise ValueError(
            f"attention_step: {int(position.amax())} tokens are in a cache of {capacity}, so it is full; "
            "make the state with a larger max_length"
        )
    return torch.ops.seqmodels_cpu.attention_step(
        q.contiguous(), k.contiguous(), v.contiguous(), key_cache, value_cache, position, scale, pinned
    )
