"""Linear attention on a GPU: the forward is one pass of ``triton_scan``, the backward three.

The gradient of log_decay follows from row products that the passes make on their way: the
gradient of c at a token is dQ.Q - dK.K, over what decays (the diagonal does not).
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.documents import token_table
from seqmodels.ops.linear_attention.triton_scan import MAX_RANK, Problem, widest
from seqmodels.ops.tiles import device_properties

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if v.dtype not in TRITON_DTYPES:
        return f"it computes in bfloat16, float16 or float32, not {v.dtype}"
    if v.shape[2] > MAX_RANK:
        return f"its tile of {MAX_RANK} rows does not hold rank {v.shape[2]}"
    device = device_properties(v.device.index)
    width = widest(device, v.dtype)
    if max(q.shape[-1], v.shape[-1]) > width:
        return (
            f"on {device.target} it holds key and value widths up to {width} in {v.dtype}, "
            f"not {q.shape[-1]} and {v.shape[-1]}"
        )
    if v.shape[0] * v.shape[1] * v.shape[2] >= 2**31:
        return f"it counts tokens x ranks in 32 bits; {tuple(v.shape[:3])} (batch, length, ranks) are too many"
    return None


def _problem(
    v: Tensor, log_decay: Tensor | None, past: Tensor | None, diagonal: Tensor | None,
    starts: Tensor | None, lengths: Tensor | None, epsilon: float,
) -> Problem:  # fmt: skip
    batch_size, length, rank, heads, _ = v.shape
    weights = (None if x is None else x.contiguous() for x in (log_decay, past, diagonal))
    return Problem(batch_size, length, rank, heads, *weights, starts, lengths, epsilon)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(v, log_decay, past_weight, diagonal_weight, starts, lengths, epsilon)
    width = (q.shape[-1], v.shape[-1] + normalize)
    initial_state = None if initial_state is None else initial_state.contiguous()
    found = problem.scan(q, k, v, initial_state, normalize=normalize, want_state=True, state_width=width)
    assert found.state is not None
    return found.output, found.state, found.state.new_empty(0) if found.denominators is None else found.denominators


def sum_groups(gradient: Tensor, groups: int) -> Tensor:
    """(..., H, N) to (..., G, N): the sum over the heads that share a group, in float32."""
    heads = gradient.shape[-2]
    if heads == groups:
        return gradient
    split = gradient.unflatten(-2, (groups, heads // groups))
    return split.sum(-2, dtype=torch.float32).to(gradient.dtype)


def decay_gradient(change: Tensor, ends: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Gradient of log_decay from that of its running sum: (B, L, H).

    ``change`` (B, L, H) is the gradient of c at each token, ``ends`` (documents, H) that of the last
    token's c through the final state. Each token's decay is in every c from it to its document's
    end; the sums are taken in float64.
    """
    batch_size, length, heads = change.shape
    if starts is None or lengths is None:
        change = change.double()
        change[:, -1] += ends
        return change.flip(1).cumsum(1).flip(1).to(ends.dtype)
    table = token_table(starts, lengths, batch_size, length)
    change = change.double() + torch.where(table.last[..., None], ends.double()[table.document], 0.0)
    change = torch.where(table.valid[..., None], change, 0.0).reshape(-1, heads)
    total = change.cumsum(0)
    last = (starts + lengths - 1).clamp_min(0)[table.document.reshape(-1)]
    suffix = (total[last] - total + change).view(batch_size, length, heads)
    return torch.where(table.valid[..., None], suffix, 0.0).to(ends.dtype)


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
    y: Tensor,
    final_state: Tensor,
    denominator: Tensor,
) -> tuple[Tensor, ...]:
    problem = _problem(v, log_decay, past_weight, diagonal_weight, starts, lengths, epsilon)
    width = (q.shape[-1], v.shape[-1] + normalize)
    grad_state = grad_state.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    lane = None
    if normalize:
        total = denominator if starts is None else torch.where(denominator == 0, 1.0, denominator)
        scaled = grad_y.float() / total[..., None]
        lane = -(scaled * y.float()).sum(-1)
        grad_y = scaled.to(v.dtype)
    decays = log_decay is not None
    of_q = problem.scan(
        grad_y, v, k, initial_state, transposed=True, lane=lane, state_width=width,
        dot_with=q if decays or diagonal_weight is not None else None, want_own=diagonal_weight is not None,
    )  # fmt: skip
    of_k = problem.scan(
        v, grad_y, q, grad_state, transposed=True, reverse=True, lane=lane, state_width=width,
        dot_with=k if decays or past_weight is not None else None, want_state=initial_state is not None,
    )  # fmt: skip
    of_v = problem.scan(k, q, grad_y, grad_state, reverse=True, state_width=width)

    none = v.new_empty(0)
    grad_log_decay = none
    if decays:
        assert of_q.dots is not None
        assert of_k.dots is not None
        change = of_q.dots - (of_k.dots if past_weight is None else of_k.dots * past_weight)
        grad_log_decay = decay_gradient(change, (final_state * grad_state).sum((-1, -2)), starts, lengths)
    return (
        sum_groups(of_q.output, q.shape[-2]),
        sum_groups(of_k.output, k.shape[-2]),
        of_v.output,
        grad_log_decay,
        none if past_weight is None else of_k.dots,
        none if diagonal_weight is None else of_q.owns,
        none if initial_state is None else of_k.state,
    )
