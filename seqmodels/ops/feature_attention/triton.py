"""Feature attention on a GPU: the forward is one pass of ``triton_scan``; the backward two of
``triton_gradient`` (queries, keys) and one of the scan (values).

Learned maps get their gradient in two steps, each in a fixed order: a program sums over its
segment, and the programs' sums are added here. The gradient of log_decay follows from row products
that the passes make on their way, as in linear attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.feature_attention.triton_problem import Problem, refusal
from seqmodels.ops.linear_attention.triton import decay_gradient, sum_groups


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem.of(v, k, key_weight, log_decay, starts, lengths, feature_map, normalize, epsilon)
    queries, keys = problem.side(q, query_weight), problem.side(k, key_weight)
    start = problem.entering(keys, v, initial_state, initial_log_scale)
    found = problem.scan(queries, keys, v, start, normalize=normalize)
    none = found.state.new_empty(0)
    return (
        found.output,
        found.state,
        none if found.log_scale is None else found.log_scale,
        none if found.denominators is None else found.denominators,
    )


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
    y: Tensor,
    final_state: Tensor,
    log_scale: Tensor,
    denominator: Tensor,
) -> tuple[Tensor, ...]:
    problem = Problem.of(v, k, key_weight, log_decay, starts, lengths, feature_map, normalize, epsilon)
    queries, keys = problem.side(q, query_weight), problem.side(k, key_weight)
    exponential = feature_map == "hedgehog_exp"
    lane = offset = None
    if exponential:  # the divisor is in the exponents
        offset, lane = denominator, -(grad_y.float() * y.float()).sum(-1)
    elif normalize:
        total = denominator if starts is None else torch.where(denominator == 0, 1.0, denominator)
        scaled = grad_y.float() / total[..., None]
        lane = -(scaled * y.float()).sum(-1)
        grad_y = scaled.to(v.dtype)
    # Back to front the state is the gradient of S e^m: relative to -m at the end.
    end_scale = -log_scale if exponential else None

    before = problem.entering(keys, v, initial_state, initial_log_scale)
    of_q = problem.gradient(queries, keys, grad_y, v, before, lane=lane, offset=offset)
    after = problem.entering(queries, grad_y, grad_state, end_scale, lane=lane, offset=offset, reverse=True)
    of_k = problem.gradient(keys, queries, v, grad_y, after, lane=lane, offset=offset, reverse=True)
    of_v = problem.scan(keys, queries, grad_y, after, lane=lane, offset=offset, reverse=True)

    none = v.new_empty(0)
    grad_decay = none
    if log_decay is not None:
        assert of_q.dots is not None
        assert of_k.dots is not None
        ends = (final_state * grad_state).sum((-1, -2))
        grad_decay = decay_gradient(of_q.dots - of_k.dots, ends, starts, lengths)
    return (
        sum_groups(of_q.x, q.shape[2]),
        sum_groups(of_k.x, k.shape[2]),
        of_v.output,
        none if of_q.weight is None else of_q.weight,
        none if of_k.weight is None else of_k.weight,
        grad_decay,
        none if initial_state is None else of_v.initial_gradient(initial_log_scale),
    )
