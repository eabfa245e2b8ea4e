"""One decode step of feature attention, from the definition in ``reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.reference import explicit, project, with_ones


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
    values = with_ones(v.to(compute)) if normalize else v.to(compute)
    uq = project(q.to(compute)[:, None], query_weight, heads)[:, 0]
    uk = project(k.to(compute)[:, None], key_weight, heads)[:, 0]
    phi_q, phi_k = explicit(uq, feature_map), explicit(uk, feature_map)
    if log_scale is not None:
        before = log_scale.clone()
        log_scale.copy_(torch.maximum(before, phi_k))
        state.mul_((before - log_scale).exp()[..., None])
        rho = (phi_q + log_scale).amax(-1, keepdim=True)
        phi_q, phi_k = (phi_q + log_scale - rho).exp(), (phi_k - log_scale).exp()
    if log_decay is not None:
        state.mul_(log_decay.exp()[..., None, None])
    state.add_(phi_k[..., :, None] * values[..., None, :])
    y = torch.einsum("bhf,bhfp->bhp", phi_q, state)
    if normalize:
        y = y[..., :-1] / (y[..., -1:] + epsilon)
    return y.to(v.dtype).contiguous()
