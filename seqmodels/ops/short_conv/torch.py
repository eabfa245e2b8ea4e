"""Short convolution in plain PyTorch: W shifted products, no host reads.

With documents, a tap that would reach over a document's first token is masked, and the W-1
rows of each document's state are added to its first tokens afterwards: tables of fixed size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu as silu_function

from seqmodels.ops.documents import token_table
from seqmodels.ops.short_conv.states import final_state_of


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_BLC, weight_WC = x.to(compute), weight.to(compute).T
    bias_C = None if bias is None else bias.to(compute)
    history = weight.shape[1] - 1
    if starts is None or lengths is None:
        if initial_state is None:
            initial_state = x_BLC.new_zeros(x.shape[0], history, x.shape[2])
        u = torch.cat([initial_state, x_BLC], dim=1)
        z = _weighted(u, weight_WC, x.shape[1], bias_C)
        final_state = u[:, u.shape[1] - history :]
    else:
        z, final_state = _packed(x_BLC, weight_WC, bias_C, initial_state, starts, lengths)
    y = silu_function(z) if silu else z
    if starts is not None and lengths is not None:
        valid = token_table(starts, lengths, x.shape[0], x.shape[1]).valid
        y = torch.where(valid.unsqueeze(-1), y, 0)
    return y.to(x.dtype).contiguous(), final_state.clone(memory_format=torch.contiguous_format)


def _weighted(u: Tensor, weight_WC: Tensor, length: int, bias_C: Tensor | None) -> Tensor:
    """Sum over w of weight[w] u[w : w + length] along dimension 1."""
    z = u[:, :length] * weight_WC[0]
    for w in range(1, weight_WC.shape[0]):
        z = z + u[:, w : w + length] * weight_WC[w]
    return z if bias_C is None else z + bias_C


def _packed(
    x_BLC: Tensor,
    weight_WC: Tensor,
    bias_C: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    batch_size, length, channels = x_BLC.shape
    history = weight_WC.shape[0] - 1
    documents = starts.shape[0]
    table = token_table(starts, lengths, batch_size, length)
    flat = torch.arange(batch_size * length, device=starts.device).view(batch_size, length)
    position_BL = flat - starts[table.document]
    x_BLC = torch.where(table.valid.unsqueeze(-1), x_BLC, 0)  # garbage in padding must not reach a sum
    z = x_BLC * weight_WC[history]
    for lag in range(1, min(history, length - 1) + 1):
        reaches = (table.valid & (position_BL >= lag))[:, lag:, None]
        shifted = torch.where(reaches, x_BLC[:, :-lag], 0) * weight_WC[history - lag]
        z = z + torch.nn.functional.pad(shifted, (0, 0, lag, 0))
    if bias_C is not None:
        z = z + bias_C
    if initial_state is None:
        initial_state = x_BLC.new_zeros(documents, history, channels)
    elif history > 0:
        # Token p < W-1 of a document reads state row p + w for every w with p + w < W-1.
        padded = torch.nn.functional.pad(initial_state, (0, 0, 0, history))
        from_state = _weighted(padded, weight_WC[:history], history, None)
        offset = torch.arange(history, device=starts.device)
        inside = offset < lengths[:, None]  # (D, W-1)
        target = ((starts[:, None] + offset) * inside).flatten()
        z = z.reshape(-1, channels).index_add(0, target, (from_state * inside.unsqueeze(-1)).flatten(0, 1))
        z = z.view(batch_size, length, channels)
    return z, final_state_of(x_BLC, initial_state, starts, lengths)
