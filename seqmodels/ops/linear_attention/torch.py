"""Linear attention in chunks, in plain PyTorch: the fast form for any device, and the plan that
the kernels follow.

A chunk is Q consecutive tokens of one document. With c the inclusive running sum of log_decay
inside the chunk, W = past_weight and S the state at the chunk's start,

    Y[i] = sum_{j<i} e^{c_i-c_j} (q_i . k_j) W_j v_j  +  diagonal_i (q_i . k_i) v_i  +  e^{c_i} q_i S
    S   <- e^{c_Q} S + sum_j e^{c_Q-c_j} W_j k_j v_j^T

so all work but the last line is matrix products over all chunks at once. What makes it cheap:

* q.k^T depends on the group only and is computed once for all heads of a group; the products
  with S and with v fold the heads of a group into the matrix width. Nothing head-expanded of
  width N is ever stored.
* W goes into v, so the decay matrix needs one exponential and one mask.
* c is kept in float64 and every difference c_i - c_j <= 0 is taken before the exponential, so
  that a large decay does not cost the tokens behind it their precision.

Shape legend: T chunks of all documents, Q tokens a chunk, R ranks, G groups (Gq, Gk), h heads of
one group, H heads, N key width, P value width (one wider with the normaliser), D documents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmodels.ops.documents import ChunkTable, chunk_table


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
    batch_size, length, ranks, _, _ = v.shape
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    tokens = max(1, min(chunk_size // ranks, length))
    values = v.to(compute)
    if normalize:
        values = pad(values, (0, 1), value=1.0)
    table = None if starts is None or lengths is None else chunk_table(starts, lengths, batch_size * length, tokens)

    def chunks(x: Tensor) -> Tensor:
        return to_chunks(x, tokens, table)

    def grid(x: Tensor, padding: float) -> Tensor:
        """(T, Q, ...) to (B, L, ...)."""
        if table is None:
            return x.reshape(batch_size, -1, *x.shape[2:])[:, :length].contiguous()
        # Every valid token stands in one chunk; the others land in a row that is cut off.
        rows = torch.where(table.valid, table.token, batch_size * length).flatten()
        full = x.new_full((batch_size * length + 1, *x.shape[2:]), padding)
        return full.index_copy(0, rows, x.flatten(0, 1))[:-1].view(batch_size, length, *x.shape[2:])

    q_TQRGN, k_TQRGN = chunks(q.to(compute)), chunks(k.to(compute))
    v_TQRHP = chunks(values)
    past_TQH, diagonal_TQH = (None if x is None else chunks(x) for x in (past_weight, diagonal_weight))
    total_TQH = None if log_decay is None else running_decay(chunks(log_decay))
    weighted_TQRHP = v_TQRHP if past_TQH is None else v_TQRHP * past_TQH[:, :, None, :, None]

    start_THNP, final = states(k_TQRGN, weighted_TQRHP, total_TQH, initial_state, table, batch_size)
    y = _inside(q_TQRGN, k_TQRGN, v_TQRHP, weighted_TQRHP, total_TQH, diagonal_TQH)
    y = y + _from_start(q_TQRGN, start_THNP, total_TQH)
    if normalize:
        divisor = y[..., -1:] + epsilon
        y = y[..., :-1] / divisor
        denominator = grid(divisor.squeeze(-1), 1.0)
    else:
        denominator = y.new_empty(0)
    return grid(y.to(v.dtype), 0.0), final.contiguous(), denominator


def to_chunks(x: Tensor, tokens: int, table: ChunkTable | None) -> Tensor:
    """(B, L, ...) to (T, Q, ...) with Q = ``tokens``, zero outside documents."""
    if table is None:
        full = pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % tokens))
        return full.reshape(-1, tokens, *x.shape[2:])
    rows = x.flatten(0, 1)[table.token]
    return rows.masked_fill(~table.valid.view(*table.valid.shape, *(1,) * (x.dim() - 2)), 0)


def running_decay(log_decay_TQH: Tensor) -> Tensor:
    """c, in float64. e^-1000 is zero in every dtype; a finite bound keeps the differences of c finite and precise."""
    return log_decay_TQH.clamp_min(-1000).cumsum(1, dtype=torch.float64)


def _inside(
    q_TQRGN: Tensor,
    k_TQRGN: Tensor,
    v_TQRHP: Tensor,
    weighted_TQRHP: Tensor,
    total_TQH: Tensor | None,
    diagonal_TQH: Tensor | None,
) -> Tensor:
    """What tokens of a chunk read from the same chunk: (T, Q, R, H, P)."""
    T, Q, R, H, P = v_TQRHP.shape
    own_inside = diagonal_TQH is None and weighted_TQRHP is v_TQRHP
    scores = _scores(q_TQRGN, k_TQRGN)
    G, h = scores.shape[1], H // scores.shape[1]
    visible = torch.ones(Q, Q, dtype=torch.bool, device=scores.device).tril(0 if own_inside else -1)
    if total_TQH is None:
        # One matrix for all heads of the group: fold them into the width.
        masked = (scores.view(T, G, Q, R, Q, R) * visible[:, None, :, None]).view(T, G, Q * R, Q * R)
        values = weighted_TQRHP.reshape(T, Q * R, G, h * P).transpose(1, 2)
        y = (masked @ values).transpose(1, 2).reshape(T, Q, R, H, P)
    else:
        decay = _decay_between(total_TQH, scores.dtype).masked_fill_(~visible, -math.inf).exp_()
        weights = scores.view(T, G, 1, Q, R, Q, R) * decay.view(T, G, h, Q, 1, Q, 1)
        values = weighted_TQRHP.reshape(T, Q * R, H, P).transpose(1, 2)
        y = (weights.view(T, H, Q * R, Q * R) @ values).transpose(1, 2).reshape(T, Q, R, H, P)
    if own_inside:
        return y
    own = scores.view(T, G, Q, R, Q, R).diagonal(dim1=2, dim2=4).permute(0, 4, 2, 3, 1)  # (T, Q, R, R, G)
    own = own.unsqueeze(-1).expand(T, Q, R, R, G, h).reshape(T, Q, R, R, H)
    if diagonal_TQH is not None:
        own = own * diagonal_TQH[:, :, None, None, :]
    # R is small: R products on (T, Q, R, H, P), with no copy that is R times as large.
    for rho in range(R):
        y = torch.addcmul(y, own[:, :, :, rho, :, None], v_TQRHP[:, :, rho, None])
    return y


def _scores(q_TQRGN: Tensor, k_TQRGN: Tensor) -> Tensor:
    """q.k^T for each pair of a q group and a k group that meet in a head: (T, G, Q R, Q R)."""
    T, Q, R, Gq, N = q_TQRGN.shape
    Gk = k_TQRGN.shape[3]
    groups = math.lcm(Gq, Gk)
    if groups > max(Gq, Gk):
        q_TQRGN = q_TQRGN.repeat_interleave(groups // Gq, dim=3)
        k_TQRGN = k_TQRGN.repeat_interleave(groups // Gk, dim=3)
        Gq = Gk = groups
    q = q_TQRGN.reshape(T, Q * R, Gq, N).transpose(1, 2)
    k = k_TQRGN.reshape(T, Q * R, Gk, N).transpose(1, 2)
    if Gq >= Gk:  # q groups that share a k group stand below one another
        rows = q.reshape(T, Gk, (Gq // Gk) * Q * R, N)
        return (rows @ k.transpose(-1, -2)).view(T, Gq, Q * R, Q * R)
    columns = k.reshape(T, Gq, (Gk // Gq) * Q * R, N)
    scores = (q @ columns.transpose(-1, -2)).view(T, Gq, Q * R, Gk // Gq, Q * R)
    return scores.transpose(2, 3).reshape(T, Gk, Q * R, Q * R)


def _decay_between(total_TQH: Tensor, dtype: torch.dtype) -> Tensor:
    """c_i - c_j for all pairs of a chunk: (T, H, Q, Q), to the relative precision of ``dtype``."""
    total = total_TQH.transpose(1, 2).contiguous()
    high = total.to(dtype)
    between = high[..., :, None] - high[..., None, :]
    if dtype != torch.float64:  # two floats hold c; a difference in float64 would be twice the traffic
        low = (total - high).to(dtype)
        between += low[..., :, None] - low[..., None, :]
    return between


def states(
    k_TQRGN: Tensor,
    weighted_TQRHP: Tensor,
    total_TQH: Tensor | None,
    initial_state: Tensor | None,
    table: ChunkTable | None,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """The state at the start of every chunk (T, H, N, P) and at the end of every document (D, H, N, P)."""
    T, Q, R, G, N = k_TQRGN.shape
    H, P = weighted_TQRHP.shape[3:]
    values = weighted_TQRHP
    if total_TQH is not None:
        values = values * (total_TQH[:, -1:] - total_TQH).to(values.dtype).exp()[:, :, None, :, None]
    k = k_TQRGN.reshape(T, Q * R, G, N).permute(0, 2, 3, 1)
    increment = k @ values.reshape(T, Q * R, G, (H // G) * P).transpose(1, 2)
    increment = increment.view(T, G, N, H // G, P).transpose(2, 3).reshape(T, H, N, P)
    if total_TQH is None:
        carry = torch.ones(T, H, dtype=increment.dtype, device=increment.device)
    else:
        carry = total_TQH[:, -1].to(increment.dtype).exp()

    if table is None:
        before = increment.new_zeros(batch_size, H, N, P) if initial_state is None else initial_state
        return _scan_rows(carry, increment, before)
    documents = table.last.shape[0]
    before = increment.new_zeros(documents, H, N, P) if initial_state is None else initial_state
    first = table.first[:, None]
    opening = before[table.document]
    increment = torch.where(first[..., None, None], increment + carry[..., None, None] * opening, increment)
    after = _scan_flat(carry.masked_fill(first, 0), increment)
    start = torch.where(first[..., None, None], opening, after.roll(1, 0))
    return start, _of_documents(after, before, table)


def _of_documents(after: Tensor, before: Tensor, table: ChunkTable) -> Tensor:
    """State at each document's end; an unused slot keeps its initial state."""
    slots = torch.arange(before.shape[0], device=before.device)
    used = table.valid[table.last, 0] & (table.document[table.last] == slots)
    return torch.where(used[:, None, None, None], after[table.last], before)


def _scan_rows(carry_TH: Tensor, increment_THNP: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """S_c = carry_c S_{c-1} + increment_c along each row: (S before each chunk, S at the end)."""
    rows = before.shape[0]
    # unbind, because the backward of an index would fill a tensor of all chunks for each chunk
    carries = carry_TH.view(rows, -1, carry_TH.shape[1], 1, 1).unbind(1)
    increments = increment_THNP.view(rows, -1, *before.shape[1:]).unbind(1)
    states = [before]
    for carry, increment in zip(carries, increments, strict=True):
        states.append(torch.addcmul(increment, carry, states[-1]))
    return torch.stack(states[:-1], dim=1).view_as(increment_THNP), states[-1].clone()


def _scan_flat(carry_TH: Tensor, increment_THNP: Tensor) -> Tensor:
    """S_c = carry_c S_{c-1} + increment_c over all chunks, S before the first one being zero.

    A row may hold any number of chunks, so there is no rectangle to run along. The chunks are cut
    into about sqrt(T) segments: scan inside all segments at once, then over segments.
    """
    T, H, N, P = increment_THNP.shape
    width = max(1, math.isqrt(T))
    behind = -T % width
    carries = pad(carry_TH, (0, 0, 0, behind)).view(-1, width, H, 1, 1).unbind(1)
    increments = pad(increment_THNP, (0, 0, 0, 0, 0, 0, 0, behind)).view(-1, width, H, N, P).unbind(1)
    states, products = [increments[0]], [carries[0]]
    for carry, increment in zip(carries[1:], increments[1:], strict=True):
        states.append(torch.addcmul(increment, carry, states[-1]))
        products.append(products[-1] * carry)
    entering = [torch.zeros_like(states[-1][0])]
    for ending, product in zip(states[-1].unbind(0)[:-1], products[-1].unbind(0)[:-1], strict=True):
        entering.append(torch.addcmul(ending, product, entering[-1]))
    inside = torch.stack(states, dim=1)
    total = torch.addcmul(inside, torch.stack(products, dim=1), torch.stack(entering)[:, None])
    return total.view(-1, H, N, P)[:T]


def _from_start(q_TQRGN: Tensor, start_THNP: Tensor, total_TQH: Tensor | None) -> Tensor:
    """e^{c_i} q_i S: what a chunk's tokens read from the state at its start, (T, Q, R, H, P)."""
    T, Q, R, G, N = q_TQRGN.shape
    H, P = start_THNP.shape[1], start_THNP.shape[3]
    q = q_TQRGN.reshape(T, Q * R, G, N).transpose(1, 2)
    start = start_THNP.view(T, G, H // G, N, P).transpose(2, 3).reshape(T, G, N, (H // G) * P)
    y = (q @ start).transpose(1, 2).reshape(T, Q, R, H, P)
    return y if total_TQH is None else y * total_TQH.to(y.dtype).exp()[:, :, None, :, None]
