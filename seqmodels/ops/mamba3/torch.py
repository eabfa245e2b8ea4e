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
from seqmodels.ops.documents import TokenTable, token_table
from seqmodels.ops.linear_attention import linear_attention


def _phases(
    phase_step_BLH: Tensor, rate_BLA: Tensor, table: TokenTable, starts_D: Tensor, initial_DHA: Tensor | None
) -> Tensor:
    """(B, L, H, A): sum of phase_step * rate inside each document, in [-pi, pi].

    Products and sums are float64: over 64K tokens, rounded float32 increments drift by 1e-3 rad.
    """
    increments = phase_step_BLH.double()[..., None] * rate_BLA.double()[:, :, None]
    sums = increments.cumsum(1)
    # What the row had summed up in front of the document, and what the document brings along.
    before = (sums - increments).flatten(0, 1)[starts_D.clamp_max(table.document.numel() - 1)]
    offset = -before if initial_DHA is None else initial_DHA - before
    sums = sums + offset[table.document]
    return (sums - 2 * math.pi * (sums / (2 * math.pi)).round().detach()).to(phase_step_BLH.dtype)


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

    phase = _phases(phase_step, rate, table, starts, initial_angle)
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
    if mimo_o is None:
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
