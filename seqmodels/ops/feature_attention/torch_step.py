"""One decode step of feature attention in plain PyTorch; the state is updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.maps import features, project
from seqmodels.ops.linear_attention import torch_step as single


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    log_scale: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    compute, heads = state.dtype, v.shape[1]
    uq, uk = project(q.to(compute), query_weight), project(k.to(compute), key_weight)
    if log_scale is None:
        phi_q, phi_k = features(uq, feature_map), features(uk, feature_map)
    else:
        uq, uk = (u.repeat_interleave(heads // u.shape[1], dim=1) for u in (uq, uk))
        log_q, log_k = torch.cat([uq, -uq], dim=-1), torch.cat([uk, -uk], dim=-1)
        top = torch.maximum(log_scale, log_k)
        state.mul_((log_scale - top).exp()[..., None])
        log_scale.copy_(top)
        log_q = log_q + top
        phi_q, phi_k = (log_q - log_q.amax(-1, keepdim=True)).exp(), (log_k - top).exp()
    return single.forward(
        phi_q.unsqueeze(1), phi_k.unsqueeze(1), v.to(compute).unsqueeze(1), log_decay, None, None, state,
        normalize, epsilon,
    ).squeeze(1).to(v.dtype)  # fmt: skip
