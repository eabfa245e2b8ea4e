"""The definition, with whole logits.

loss = sum over tokens t with target_t >= 0 of logsumexp_v(z_tv) - z_{t, target_t},  z = hidden weight^T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden.to(weight.dtype) @ weight.t()
    counted = targets >= 0
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = torch.where(counted, logits.logsumexp(1) - chosen, 0.0)
    if not with_gradients:
        return losses.sum(), hidden.new_empty(0), weight.new_empty(0)
    probabilities = logits.softmax(1)
    one_hot = torch.zeros_like(logits).scatter_(1, targets.clamp(min=0)[:, None], 1.0)
    grad_logits = (probabilities - one_hot) * counted[:, None]
    return losses.sum(), (grad_logits @ weight).to(hidden.dtype), grad_logits.t() @ hidden.to(weight.dtype)


def backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_size: int,
    with_gradients: bool,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss.to(grad_weight.dtype)
