"""One decode step of linear attention, from the definition in ``reference.py``."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.linear_attention.reference import advance, heads_of_groups, normalized, with_ones


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    state: Tensor,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    heads = v.shape[-2]
    q, k = (heads_of_groups(x.to(state.dtype), heads) for x in (q, k))
    values = v.to(state.dtype)
    if normalize:
        values = with_ones(values)
    y, after = advance(q, k, values, log_decay, past_weight, diagonal_weight, state)
    state.copy_(after)
    return (normalized(y, epsilon) if normalize else y).to(v.dtype).contiguous()
