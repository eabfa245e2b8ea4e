"""The state of feature attention without queries, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.torch import Keys, supports
from seqmodels.ops.linear_attention import torch_state as chunked

__all__ = ["forward", "supports"]


def forward(
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    normalize: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    keys = Keys(k.to(compute), key_weight, initial_state, initial_log_scale, starts, lengths, feature_map, v.shape[2])
    state = chunked.forward(
        keys.phi.unsqueeze(2), v.to(keys.phi.dtype).unsqueeze(2), log_decay, None, keys.initial_state,
        starts, lengths, normalize, chunk_size,
    )  # fmt: skip
    return state.to(compute), keys.log_scale
