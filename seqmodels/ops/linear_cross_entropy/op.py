"""``linear_cross_entropy``: head and cross-entropy in one op, whole logits never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmodels.ops.registration import Operator, cast_inputs, state_dtype

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, with_gradients: bool) -> tuple[Tensor, ...]:
    loss = hidden.new_empty((), dtype=state_dtype(hidden.dtype))
    if with_gradients:
        return loss, torch.empty_like(hidden), torch.empty_like(weight)
    return loss, hidden.new_empty(0), weight.new_empty(0)


_operator = Operator(
    "linear_cross_entropy",
    "Tensor hidden, Tensor weight, Tensor targets, int chunk_size, bool with_gradients",
    outputs=3,
    residuals=2,
    fake=_fake,
    differentiable=(0, 1),
    modules={
        "reference": "seqmodels.ops.linear_cross_entropy.reference",
        "torch": "seqmodels.ops.linear_cross_entropy.torch",
    },
)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """loss = sum_t [logsumexp_v(z_tv) - z_{t, target_t}] over tokens t with a target, z = hidden weight^T.

    The logits of ``chunk_size`` tokens at a time exist, never all. Under autocast the products run in
    its dtype; the softmax and the sums are float32 (float64 for float64 inputs). Exact gradients to
    ``hidden`` and ``weight``, not twice differentiable.

    Args:
        hidden: (tokens, d_model).
        weight: (vocabulary, d_model), the head or a tied embedding.
        targets: (tokens,) int64; ``IGNORE_INDEX`` (any negative value) where nothing is scored.
        chunk_size: tokens whose logits exist at a time; by default what fits 64 MiB of float32.

    Returns:
        The sum, a scalar in nats. Divide by the number of targets for the mean.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "expected (tokens, d_model) and (vocabulary, d_model)"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: targets is {tuple(targets.shape)}; expected ({hidden.shape[0]},), one a token"
        )
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    elif chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size is {chunk_size}; expected at least 1")
    (hidden,) = cast_inputs(hidden)
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: Any = _operator(hidden.contiguous(), weight, targets, chunk_size, with_gradients)
    return result[0]
