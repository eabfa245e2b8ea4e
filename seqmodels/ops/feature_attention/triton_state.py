"""The state of feature attention without queries, on a GPU: the scan's pass over keys and values alone.

Its backward needs no scores: the gradient of the final state, carried back to front, is all that keys
and values see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.maps import NO_KEY
from seqmodels.ops.feature_attention.triton_problem import Problem, refusal
from seqmodels.ops.linear_attention.triton import decay_gradient, sum_groups


def supports(
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    *rest: object,
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return refusal(k, v, key_weight, feature_map)


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
    problem = Problem.of(v, k, key_weight, log_decay, starts, lengths, feature_map, normalize, 0.0)
    keys = problem.side(k, key_weight)
    found = problem.scan(
        None, keys, v, problem.entering(keys, v, initial_state, initial_log_scale), normalize=normalize
    )
    return found.state, found.state.new_empty(0) if found.log_scale is None else found.log_scale


def backward(
    grad_state: Tensor,
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
    log_scale: Tensor,
) -> tuple[Tensor, ...]:
    problem = Problem.of(v, k, key_weight, log_decay, starts, lengths, feature_map, normalize, 0.0)
    keys, exponential = problem.side(k, key_weight), feature_map == "hedgehog_exp"
    # The passes of the whole op, with queries that ask for nothing: no gradient of y or of the divisor.
    nothing = torch.zeros_like(v, memory_format=torch.contiguous_format)
    lane = nothing.new_zeros(v.shape[:3], dtype=torch.float32) if normalize else None
    offset = None if lane is None or not exponential else lane - NO_KEY
    after = problem.entering(
        keys, nothing, grad_state, -log_scale if exponential else None, lane=lane, offset=offset, reverse=True
    )
    of_k = problem.gradient(keys, keys, v, nothing, after, lane=lane, offset=offset, reverse=True)
    of_v = problem.scan(keys, keys, nothing, after, lane=lane, offset=offset, reverse=True)
    none = v.new_empty(0)
    grad_decay = none
    if log_decay is not None:
        assert of_k.dots is not None
        final = forward(
            k,
            v,
            key_weight,
            log_decay,
            initial_state,
            initial_log_scale,
            starts,
            lengths,
            feature_map,
            normalize,
            chunk_size,
        )[0]
        grad_decay = decay_gradient(-of_k.dots, (final * grad_state).sum((-1, -2)), starts, lengths)
    return (
        sum_groups(of_k.x, k.shape[2]),
        of_v.output,
        none if of_k.weight is None else of_k.weight,
        grad_decay,
        none if initial_state is None else of_v.initial_gradient(initial_log_scale),
    )
