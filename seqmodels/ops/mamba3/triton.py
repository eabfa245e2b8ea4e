"""Mamba-3 on a GPU: a fused prologue, linear attention's kernels, a fused epilogue.

    q, k = rotate(norm(c), norm(b)) with biases                      triton_prologue
    y = linear attention of q, k, v = mimo_x x with
        past_weight s_j = g_j + (1 - trapezoid_{j+1}) dt_{j+1},  diagonal_weight g_j = trapezoid_j dt_j
    out = sum_r mimo_o norm(y + skip v) silu(mimo_z z)               triton_epilogue

(the weights: a token enters every later output with its own step's weight and the look-back of the
next one's, which carries that step's decay). s has no second term at a document's end, so the state
behind it is a decode state; a carried (k, v) joins the initial state with the first token's look-back.

Nothing but the op's inputs is kept for the backward: it recomputes the three parts and differentiates
each by its own kernels. Head-expanded q and k live in memory only while one layer runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels import backends
from seqmodels.layout import Layout
from seqmodels.ops.documents import token_table
from seqmodels.ops.linear_attention import linear_attention
from seqmodels.ops.linear_attention.triton_scan import MAX_RANK, widest
from seqmodels.ops.mamba3.triton_epilogue import Epilogue
from seqmodels.ops.mamba3.triton_prologue import Prologue
from seqmodels.ops.tiles import device_properties

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(x: Tensor, b: Tensor, *rest: object) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if x.dtype not in TRITON_DTYPES:
        return f"it computes in bfloat16, float16 or float32, not {x.dtype}"
    if b.shape[-1] % 2:
        return f"it holds the lanes of the state in pairs; d_state is {b.shape[-1]}"
    if b.shape[2] > MAX_RANK:
        return f"it holds up to {MAX_RANK} ranks, not {b.shape[2]}"
    device = device_properties(x.device.index)
    width = widest(device, x.dtype)
    if max(x.shape[-1], b.shape[-1]) > width:
        return (
            f"on {device.target} it holds head_dim and d_state up to {width} in {x.dtype}, "
            f"not {x.shape[-1]} and {b.shape[-1]}"
        )
    return None


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
    batch_size, length = x.shape[:2]
    q, k, angle = Prologue.apply(
        b, c, phase_step, rate, b_weight, c_weight, b_bias, c_bias, initial_angle, starts, lengths, pairing, epsilon
    )
    v = x.unsqueeze(2) if mimo_x is None else (mimo_x.transpose(0, 1) * x.unsqueeze(2)).to(x.dtype)

    layout, table = None, None
    if starts is not None and lengths is not None:
        table = token_table(starts, lengths, batch_size, length)
        position = torch.arange(batch_size * length, device=x.device).view(batch_size, length) - starts[table.document]
        layout = Layout(starts, lengths, table.document.masked_fill(~table.valid, -1), position * table.valid)
        # Nothing of the padding may reach a gradient, whatever stands there; the kernels mask for themselves.
        dt, trapezoid = (value.masked_fill(~table.valid[..., None], 0) for value in (dt, trapezoid))
    own = trapezoid * dt
    look_back = dt - own
    look_ahead = F.pad(look_back[:, 1:], (0, 0, 0, 1))
    if table is not None:
        look_ahead = look_ahead.masked_fill(table.last[..., None], 0)

    def of_document(tokens: Tensor, row: Tensor | int) -> Tensor:
        """The token of each document at flat index ``row``; column ``row`` without documents."""
        return tokens[:, row] if isinstance(row, int) else tokens.flatten(0, 1)[row]

    first, last, used = 0, length - 1, None
    if starts is not None and lengths is not None:
        first = starts.clamp_max(batch_size * length - 1)
        last = (starts + lengths - 1).clamp(0, batch_size * length - 1)
        used = lengths > 0
    carried = None
    if initial_ssm is not None:
        assert initial_k is not None
        assert initial_v is not None
        weight = of_document(look_back, first)
        if used is not None:
            weight = weight * used[:, None]
        before = initial_v[:, None] if mimo_x is None else mimo_x.transpose(0, 1) * initial_v[:, None]
        carried = initial_ssm.transpose(-1, -2) + torch.einsum("dh,drhn,drhp->dhnp", weight, initial_k, before)
    with backends.backend("triton"):
        y, ssm = linear_attention(
            q, k, v, log_decay, past_weight=own + look_ahead, diagonal_weight=own, initial_state=carried, layout=layout
        )
    valid = None if table is None else table.valid
    out = Epilogue.apply(y, x, z, skip, mimo_x, mimo_z, mimo_o, norm_weight, valid, epsilon)

    def last_rows(tokens: Tensor, initial: Tensor | None) -> Tensor:
        """What stands at each document's last token, float32; an unused slot keeps what it had."""
        rows = of_document(tokens, last).float()
        if used is None:
            return rows.clone(memory_format=torch.contiguous_format)
        other = torch.zeros_like(rows) if initial is None else initial
        return torch.where(used.view(-1, *[1] * (rows.dim() - 1)), rows, other)

    return out, angle, ssm.transpose(-1, -2).contiguous(), last_rows(k, initial_k), last_rows(x, initial_v)
