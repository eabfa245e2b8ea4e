"""Feature attention by its definition: every pair of tokens, weighted one query at a time.

For query i and the keys j <= i of its document, with d the product of decays after j:

    w_ij = d_ij phi(q_i) . phi(k_j),   y_i = (sum_j w_ij v_j + d_i phi(q_i) S_0) / (sum of weights + epsilon)

The products phi(q) . phi(k) come from the maps' closed forms where there is one, so that neither
chunks nor a packed feature order can hide an error. hedgehog_exp is computed from logarithms:
log(phi(q) . phi(k)) = logsumexp over features, each query's weights relative to e^rho with
rho_i = max over features of (log phi(q_i) + running maximum of log phi(k)).

Shapes: B rows, L tokens, H heads, D key width, f width of u, F features, P value width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.ops.documents import TokenTable, token_table
from seqmodels.ops.feature_attention.maps import NO_KEY


def project(x_BLGD: Tensor, weight_HDf: Tensor | None, heads: int) -> Tensor:
    """u for every head: (B, L, H, f)."""
    u = x_BLGD.repeat_interleave(heads // x_BLGD.shape[2], dim=2)
    return u if weight_HDf is None else torch.einsum("blhd,hdf->blhf", u, weight_HDf)


def explicit(u: Tensor, feature_map: str) -> Tensor:
    """phi(u), feature by feature; log phi(u) for hedgehog_exp."""
    width = u.shape[-1]
    if feature_map == "hedgehog_exp":
        return torch.cat([u, -u], dim=-1)
    if feature_map == "hedgehog_split":
        up, down = (u - u.amax(-1, keepdim=True)).exp(), (u.amin(-1, keepdim=True) - u).exp()
        return torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], dim=-1)
    if feature_map == "hedgehog_joint":
        top = u.abs().amax(-1, keepdim=True)
        both = torch.cat([(u - top).exp(), (-u - top).exp()], dim=-1)
        return both / both.sum(-1, keepdim=True)
    if feature_map == "taylor":
        columns = [torch.ones_like(u[..., 0]), *(u[..., a] / width**0.25 for a in range(width))]
        for a in range(width):
            columns.append(u[..., a] ** 2 / math.sqrt(2 * width))
            columns.extend(u[..., a] * u[..., b] / math.sqrt(width) for b in range(a + 1, width))
        return torch.stack(columns, dim=-1)
    if feature_map == "elu":
        return torch.where(u > 0, u + 1, u.clamp_max(0).exp())
    return u if feature_map == "identity" else u.clamp_min(0)


def similarity(u_BHf: Tensor, u_BLHf: Tensor, phi_BHF: Tensor, phi_BLHF: Tensor, feature_map: str) -> Tensor:
    """phi(q_i) . phi(k_j) of one query with all keys, (B, L, H); its logarithm for hedgehog_exp."""
    if feature_map == "taylor":
        s = torch.einsum("bhf,blhf->blh", u_BHf, u_BLHf) / math.sqrt(u_BHf.shape[-1])
        return 1 + s + s * s / 2
    if feature_map == "hedgehog_exp":
        return torch.logsumexp(phi_BHF[:, None] + phi_BLHF, dim=-1)
    return torch.einsum("bhf,blhf->blh", phi_BHF, phi_BLHF)


def with_ones(v: Tensor) -> Tensor:
    """(..., P) to (..., P + 1): the value column that accumulates the normaliser."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def tokens_of(
    starts: Tensor | None, lengths: Tensor | None, batch_size: int, length: int, device: torch.device
) -> tuple[TokenTable, int]:
    """Each token's document, and the number of document slots."""
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=device) * length
        lengths = torch.full_like(starts, length)
    return token_table(starts, lengths, batch_size, length), starts.shape[0]


def running_maximum(log_phi: Tensor, top: Tensor | None, table: TokenTable, documents: int) -> tuple[Tensor, Tensor]:
    """Maximum of log phi(k) over the document so far (B, L, H, F), and at its end (documents, H, F)."""
    B, L, H, width = log_phi.shape
    before = log_phi.new_full((documents, H, width), NO_KEY) if top is None else top
    final = torch.cat([before, before[:1]])
    current, rows = before.new_full((B, H, width), NO_KEY), []
    for t in range(L):
        valid, document = table.valid[:, t, None, None], table.document[:, t]
        current = torch.where(table.first[:, t, None, None], before[document], current)
        current = torch.where(valid, torch.maximum(current, log_phi[:, t]), current)
        final = final.index_copy(0, torch.where(table.last[:, t], document, documents), current)
        rows.append(current)
    return torch.stack(rows, dim=1), final[:-1]


def final_state(
    phi_BLHF: Tensor,
    v_BLHP: Tensor,
    log_decay: Tensor | None,
    before: Tensor,
    table: TokenTable,
) -> Tensor:
    """sum_j d_j phi(k_j) v_j^T + d S_0 over each document: (documents, H, F, P)."""
    B, L = table.valid.shape
    state, final = before.new_zeros(B, *before.shape[1:]), torch.cat([before, before[:1]])
    for t in range(L):
        keep = table.valid[:, t, None, None, None]
        state = torch.where(table.first[:, t, None, None, None], before[table.document[:, t]], state)
        if log_decay is not None:
            state = state * log_decay[:, t].exp()[..., None, None]
        state = torch.where(keep, state + phi_BLHF[:, t, :, :, None] * v_BLHP[:, t, :, None, :], state)
        slot = torch.where(table.last[:, t], table.document[:, t], before.shape[0])
        final = final.index_copy(0, slot, state)
    return final[:-1]


class Keys(NamedTuple):
    phi: Tensor  # (B, L, H, F); log phi for hedgehog_exp
    final: Tensor  # (documents, H, F, P), relative to e^log_scale
    before: Tensor  # the initial state as it was given, or zero
    log_scale: Tensor  # empty but for hedgehog_exp, like the next two
    start_scale: Tensor  # what `before` is relative to
    running: Tensor  # (B, L, H, F), the maximum so far


def keys_into_state(
    u: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    feature_map: str,
    table: TokenTable,
    documents: int,
) -> Keys:
    """phi(k) and the state that keys and values leave behind."""
    phi = explicit(u, feature_map)
    H, width = phi.shape[2:]
    before = values.new_zeros(documents, H, width, values.shape[-1]) if initial_state is None else initial_state
    none = values.new_empty(0)
    if feature_map != "hedgehog_exp":
        return Keys(phi, final_state(phi, values, log_decay, before, table), before, none, none, none)
    with torch.no_grad():  # maxima are scales, constant for gradients: nothing depends on them
        running, log_scale = running_maximum(phi, initial_log_scale, table, documents)
        start = torch.full_like(log_scale, NO_KEY) if initial_log_scale is None else initial_log_scale
    # Masked before the exponential: an unused document's scale would make it infinite.
    relative = (phi - log_scale[table.document]).masked_fill(~table.valid[..., None, None], -math.inf).exp()
    final = final_state(relative, values, None, before * (start - log_scale).exp()[..., None], table)
    return Keys(phi, final, before, log_scale, start, running)


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
    B, L, H, _ = v.shape
    output_dtype, compute = v.dtype, torch.float64 if v.dtype == torch.float64 else torch.float32
    table, documents = tokens_of(starts, lengths, B, L, v.device)
    keep = table.valid[:, :, None, None]
    q, k, v = (torch.where(keep, x.to(compute), 0) for x in (q, k, v))
    if log_decay is not None:
        log_decay = torch.where(keep[..., 0], log_decay, 0)
    values = with_ones(v) if normalize else v
    uq, uk = project(q, query_weight, H), project(k, key_weight, H)
    phi_q = explicit(uq, feature_map)
    keys = keys_into_state(uk, values, log_decay, initial_state, initial_log_scale, feature_map, table, documents)
    phi_k, before = keys.phi, keys.before
    read, rho = phi_q, None
    if feature_map == "hedgehog_exp":
        rho = (phi_q + keys.running).amax(-1).detach()  # (B, L, H)
        # What meets the initial state, which is relative to e^start_scale.
        read = phi_q + keys.start_scale[table.document] - rho[..., None]
        read = read.masked_fill(~keep, -math.inf).exp()

    outputs, decay = [], values.new_zeros(B, L, H)
    from_start = values.new_zeros(B, H)
    same = (table.document[:, :, None] == table.document[:, None, :]) & table.valid[:, :, None] & table.valid[:, None]
    for i in range(L):
        step = values.new_ones(B, H) if log_decay is None else log_decay[:, i].exp()
        from_start = torch.where(table.first[:, i, None], 1, from_start) * step
        decay = torch.cat([decay[:, :i] * step[:, None], values.new_ones(B, 1, H), decay[:, i + 1 :]], dim=1)
        weight = similarity(uq[:, i], uk[:, : i + 1], phi_q[:, i], phi_k[:, : i + 1], feature_map)
        visible = same[:, i, : i + 1, None]
        if rho is not None:
            weight = (weight - rho[:, i, None]).masked_fill(~visible, -math.inf).exp()
        weight = torch.where(visible, weight * decay[:, : i + 1], 0)
        y = torch.einsum("blh,blhp->bhp", weight, values[:, : i + 1])
        opening = before[table.document[:, i]]
        outputs.append(y + from_start[..., None] * torch.einsum("bhf,bhfp->bhp", read[:, i], opening))
    y = torch.stack(outputs, dim=1)
    denominator = values.new_empty(0)
    if normalize:
        denominator = torch.where(keep[..., 0], y[..., -1] + epsilon, 1)
        y = y[..., :-1] / denominator[..., None]
    return torch.where(keep, y, 0).to(output_dtype).contiguous(), keys.final.contiguous(), keys.log_scale, denominator
