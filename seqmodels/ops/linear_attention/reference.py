"""Linear attention, token by token: the definition that every other implementation is judged by.

For one head of one document, with state ``S`` (N, P):

    S'    = e^{log_decay_t} S_{t-1}
    y_t,r = q_t,r S' + diagonal_weight_t sum_rho (q_t,r . k_t,rho) v_t,rho
    S_t   = S' + past_weight_t sum_rho k_t,rho v_t,rho^T

With ``normalize`` every value carries a further column of ones, and the output is divided by
that column plus epsilon. Shapes: B rows, L tokens, R ranks, G groups, H heads, N key width,
P value width, D documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.documents import token_table


def heads_of_groups(x: Tensor, heads: int) -> Tensor:
    """(..., G, N) to (..., H, N): head h reads group h * G // H."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def with_ones(v: Tensor) -> Tensor:
    """(..., P) to (..., P + 1): the value column that accumulates the normaliser."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def advance(
    q_BRHN: Tensor,
    k_BRHN: Tensor,
    v_BRHP: Tensor,
    log_decay_BH: Tensor | None,
    past_weight_BH: Tensor | None,
    diagonal_weight_BH: Tensor | None,
    state_BHNP: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (y (B, R, H, P), next state)."""
    if log_decay_BH is not None:
        state_BHNP = state_BHNP * log_decay_BH.exp()[..., None, None]
    own = torch.einsum("brhn,bshn,bshp->brhp", q_BRHN, k_BRHN, v_BRHP)
    if diagonal_weight_BH is not None:
        own = own * diagonal_weight_BH[:, None, :, None]
    y = torch.einsum("brhn,bhnp->brhp", q_BRHN, state_BHNP) + own
    increment = torch.einsum("brhn,brhp->bhnp", k_BRHN, v_BRHP)
    if past_weight_BH is not None:
        increment = increment * past_weight_BH[..., None, None]
    return y, state_BHNP + increment


def normalized(y: Tensor, epsilon: float) -> Tensor:
    """(..., P + 1) to (..., P): divides by the last column plus epsilon."""
    return y[..., :-1] / (y[..., -1:] + epsilon)


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
    batch_size, length, _, heads, _ = v.shape
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k = (heads_of_groups(x.to(compute), heads) for x in (q, k))
    output_dtype, v = v.dtype, v.to(compute)
    if normalize:
        v = with_ones(v)
    documents = batch_size if starts is None else starts.shape[0]
    state_shape = (documents, heads, q.shape[-1], v.shape[-1])
    before = torch.zeros(state_shape, dtype=compute, device=v.device) if initial_state is None else initial_state
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=v.device) * length
        lengths = torch.full_like(starts, length)
    table = token_table(starts, lengths, batch_size, length)

    # A further slot collects what no document wants.
    final = torch.cat([before, before.new_zeros(1, *before.shape[1:])])
    state = torch.zeros_like(before[:1]).expand(batch_size, *before.shape[1:])
    outputs, denominators = [], []
    for t in range(length):
        valid, document = table.valid[:, t], table.document[:, t]
        keep = valid[:, None, None, None]
        state = torch.where(table.first[:, t, None, None, None], before[document], state)
        decay, past, diagonal = (
            None if x is None else torch.where(valid[:, None], x[:, t], 0)
            for x in (log_decay, past_weight, diagonal_weight)
        )
        q_t, k_t, v_t = (torch.where(keep, x[:, t], 0) for x in (q, k, v))
        y, state = advance(q_t, k_t, v_t, decay, past, diagonal, state)
        final = final.index_copy(0, torch.where(table.last[:, t], document, documents), state)
        outputs.append(torch.where(keep, normalized(y, epsilon) if normalize else y, 0))
        denominators.append(torch.where(keep[..., 0], y[..., -1] + epsilon, 1))
    denominator = torch.stack(denominators, dim=1) if normalize else state.new_empty(0)
    return torch.stack(outputs, dim=1).to(output_dtype), final[:-1], denominator
