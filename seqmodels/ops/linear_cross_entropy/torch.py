"""Cross-entropy by chunks of tokens: a chunk's logits are made, used for loss and gradients, dropped.

The gradients of the sum do not depend on what comes after it, so they are made in the forward,
while the chunk's logits exist; the backward only scales them. That saves the product that a
recomputing backward would repeat. Products run in ``hidden``'s dtype, the softmax and the sums
over chunks in float32 (float64 beside float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    cast = weight.to(hidden.dtype)
    loss = torch.zeros((), dtype=precise, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if with_gradients else hidden.new_empty(0)
    grad_weight = (
        torch.zeros(weight.shape, dtype=precise, device=weight.device) if with_gradients else weight.new_empty(0)
    )
    for start in range(0, tokens, chunk_size):
        rows = hidden[start : start + chunk_size]
        chosen = targets[start : start + chunk_size]
        counted = chosen >= 0
        chosen = chosen.clamp(min=0)
        log_probabilities = torch.mm(rows, cast.t()).log_softmax(1, dtype=precise)
        loss -= torch.where(counted, log_probabilities.gather(1, chosen[:, None])[:, 0], 0.0).sum()
        if not with_gradients:
            continue
        # softmax - one_hot, in place; rows that do not count become zero.
        grad_logits = log_probabilities.exp_()
        row = torch.arange(rows.shape[0], device=hidden.device)
        grad_logits[row, chosen] -= 1.0
        grad_logits = grad_logits.masked_fill_(~counted[:, None], 0.0).to(hidden.dtype)
        torch.mm(grad_logits, cast, out=grad_hidden[start : start + chunk_size])
        if hidden.dtype == precise:
            grad_weight.addmm_(grad_logits.t(), rows)
        else:
            grad_weight += torch.mm(grad_logits.t(), rows)
    return loss, grad_hidden, grad_weight.to(weight.dtype)


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
