"""Mamba-3 in plain PyTorch, by chunks, on any device.

Unrolled, the two-term recurrence is linear attention whose past and own tokens weigh
differently: token j enters its own output with g_j = trapezoid_j dt_j and every later one with

    s_j = g_j + (1 - trapezoid_{j+1}) dt_{j+1}        (second term 0 at a document's end)

because the look-back term of step j + 1 carries that step's decay. So rotated queries and keys,
``past_weight = s`` and ``diagonal_weight = g`` go to :func:`seqmodels.ops.linear_attention.linear_attention`.
A carried (k, v) joins the initial state with the first token's (1 - trapezoid) dt, without a decay.
Since s has no second term at the end of a document, the final state is a decode state.

Shape suffixes: B rows, L tokens, R ranks, G groups, H heads, N state width, P head width,
A angles, D documents.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels import backends
from seqmodels.layout import Layout
from seqmodels.ops.documents import chunk_table, token_table
from seqmodels.ops.linear_attention import linear_attention

PHASE_CHUNK = 64


def _phases(increments_BLHA: Tensor, initial_DHA: Tensor | None) -> Tensor:
    """Running sums over the length, each row from its own initial phase."""
    sums = increments_BLHA.cumsum(1)
    return sums if initial_DHA is None else sums + initial_DHA[:, None]


def _document_phases(
    increments_BLHA: Tensor, starts_D: Tensor, lengths_D: Tensor, initial_DHA: Tensor | None
) -> Tensor:
    """Running sums inside each document.

    Sums inside chunks that span no two documents, then a scan over chunks that is cut between
    documents: nothing, not even a rounding error, passes from one document to another.
    """
    batch_size, length = increments_BLHA.shape[:2]
    table = chunk_table(starts_D, lengths_D, batch_size * length, PHASE_CHUNK)
    inside_TQHA = increments_BLHA.flatten(0, 1)[table.token].masked_fill(~table.valid[..., None, None], 0).cumsum(1)
    total_THA, follows_T11 = inside_TQHA[:, -1], ~table.first[:, None, None]
    shift = 1
    while shift < total_THA.shape[0]:
        earlier = F.pad(total_THA[:-shift], (0, 0, 0, 0, shift, 0))
        total_THA = total_THA + torch.where(follows_T11, earlier, 0)
        follows_T11 = follows_T11 & F.pad(follows_T11[:-shift], (0, 0, 0, 0, shift, 0))
        shift *= 2
    before_THA = F.pad(total_THA[:-1], (0, 0, 0, 0, 1, 0)).masked_fill(table.first[:, None, None], 0)
    if initial_DHA is not None:
        before_THA = before_THA + initial_DHA[table.document]
    # Every valid token stands in one chunk; the others land in a row that is cut off.
    rows = torch.where(table.valid, table.token, batch_size * length).flatten()
    grid = increments_BLHA.new_zeros(batch_size * length + 1, *increments_BLHA.shape[2:])
    grid = grid.index_copy(0, rows, (inside_TQHA + before_THA[:, None]).flatten(0, 1))
    return grid[:-1].view_as(increments_BLHA)


def _rotated(x_BLRHN: Tensor, cosine_BLHA: Tensor, sine_BLHA: Tensor, pairing: str) -> Tensor:
    """Turns lane pair i by angle i: (2i, 2i+1) when adjacent, (i, i + N // 2) when half."""
    pairs, width = cosine_BLHA.shape[-1], x_BLRHN.shape[-1]
    cosine, sine = cosine_BLHA[:, :, None], sine_BLHA[:, :, None]
    if pairing == "adjacent":
        u, w = x_BLRHN[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
        turned = torch.stack((u * cosine - w * sine, u * sine + w * cosine), dim=-1).flatten(-2)
        return torch.cat((turned, x_BLRHN[..., 2 * pairs :]), dim=-1)
    half = width // 2
    u, w = x_BLRHN[..., :pairs], x_BLRHN[..., half : half + pairs]
    parts = (
        u * cosine - w * sine,
        x_BLRHN[..., pairs:half],
        u * sine + w * cosine,
        x_BLRHN[..., half + pairs :],
    )
    return torch.cat(parts, dim=-1)


def _heads(raw_BLRGN: Tensor, weight_N: Tensor, bias_HRN: Tensor, epsilon: float) -> Tensor:
    """(B, L, R, H, N) before rotation: norm, then every head's group, then its bias."""
    heads, groups = bias_HRN.shape[0], raw_BLRGN.shape[3]
    normed = F.rms_norm(raw_BLRGN, raw_BLRGN.shape[-1:], weight_N, epsilon)
    return normed.repeat_interleave(heads // groups, dim=3) + bias_HRN.transpose(0, 1)


def _columns(mix_HRP: Tensor, x: Tensor) -> Tensor:
    """Every rank's copy of (..., H, P): (..., R, H, P)."""
    return mix_HRP.transpose(0, 1) * x.unsqueeze(-3)


def forward(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    trapezoid: Tensor,
    phase_step: Tensor,
    rate: Tensor,
    b_weight: Tensor,
    c_weight: Tensor,
    b_bias: Tensor,
    c_bias: Tensor,
    skip: Tensor,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    norm_weight: Tensor | None,
    initial_angle: Tensor | None,
    initial_ssm: Tensor | None,
    initial_k: Tensor | None,
    initial_v: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    pairing: str,
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch_size, length, heads, head_dim = x.shape
    layout, compute = None, dt.dtype
    if starts is None:
        starts = torch.arange(batch_size, device=x.device) * length
        lengths = torch.full_like(starts, length)
        table = token_table(starts, lengths, batch_size, length)
    else:
        assert lengths is not None
        table = token_table(starts, lengths, batch_size, length)
        position = torch.arange(batch_size * length, device=x.device).view(batch_size, length) - starts[table.document]
        layout = Layout(starts, lengths, table.document.masked_fill(~table.valid, -1), position * table.valid)
        # Nothing of the padding may reach a sum or a gradient, whatever stands there.
        x, b, c, z, dt, log_decay, trapezoid, phase_step, rate = (
            value.masked_fill(~table.valid.view(batch_size, length, *[1] * (value.dim() - 2)), 0)
            for value in (x, b, c, z, dt, log_decay, trapezoid, phase_step, rate)
        )
    first = starts.clamp_max(batch_size * length - 1)
    last = (starts + lengths - 1).clamp(0, batch_size * length - 1)
    used = lengths > 0

    # Products and sums in float64: over 64K tokens, rounded float32 increments drift by 1e-3 rad.
    increments = phase_step.double()[..., None] * rate.double()[:, :, None]
    if layout is None:
        phase = _phases(increments, initial_angle)
    else:
        phase = _document_phases(increments, starts, lengths, initial_angle)
    phase = (phase - 2 * math.pi * (phase / (2 * math.pi)).round().detach()).to(compute)
    cosine, sine = phase.cos(), phase.sin()
    k = _rotated(_heads(b.to(compute), b_weight, b_bias, epsilon), cosine, sine, pairing)
    q = _rotated(_heads(c.to(compute), c_weight, c_bias, epsilon), cosine, sine, pairing)
    v = x.to(compute) if mimo_x is None else _columns(mimo_x, x.to(compute))

    own = trapezoid * dt
    look_back = dt - own
    look_ahead = F.pad(look_back[:, 1:], (0, 0, 0, 1)).masked_fill(table.last[..., None], 0)
    carried = None
    if initial_ssm is not None:
        assert initial_k is not None
        assert initial_v is not None
        weight = look_back.flatten(0, 1)[first] * used[:, None]
        before = initial_v[:, None] if mimo_x is None else _columns(mimo_x, initial_v)
        carried = initial_ssm.transpose(-1, -2) + torch.einsum("dh,drhn,drhp->dhnp", weight, initial_k, before)
    low = x.dtype  # matrix products in the model's dtype, sums in float32
    siso = mimo_x is None
    with backends.backend("torch"):
        y, ssm = linear_attention(
            (q.squeeze(2) if siso else q).to(low),
            (k.squeeze(2) if siso else k).to(low),
            v.to(low),
            log_decay,
            past_weight=own + look_ahead,
            diagonal_weight=own,
            initial_state=carried,
            layout=layout,
            chunk_size=chunk_size,
        )
    y = y.to(compute) + skip[:, None] * v
    gate = z.to(compute)
    if norm_weight is not None:
        y = F.rms_norm(y, (head_dim,), None, epsilon) * norm_weight.view(heads, head_dim)
    if mimo_o is None or mimo_z is None:  # both or none
        out = y * F.silu(gate)
    else:
        out = (mimo_o.transpose(0, 1) * y * F.silu(_columns(mimo_z, gate))).sum(dim=2)
    if layout is not None:
        out = out.masked_fill(~table.valid[..., None, None], 0)

    def last_rows(tokens: Tensor, initial: Tensor | None) -> Tensor:
        """What stands at each document's last token; an unused slot keeps what it had."""
        rows = tokens.flatten(0, 1)[last]
        if layout is None:
            return rows
        other = torch.zeros_like(rows) if initial is None else initial
        return torch.where(used.view(-1, *[1] * (rows.dim() - 1)), rows, other)

    return (
        out.to(low),
        last_rows(phase, initial_angle),
        ssm.transpose(-1, -2).contiguous(),
        last_rows(k, initial_k),
        last_rows(x.to(compute), initial_v),
    )
