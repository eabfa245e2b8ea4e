"""A diagonal SSM by products with small matrices, in plain PyTorch.

Documents are cut into chunks of Q tokens. With E[l] = e^{l z} and states as pairs of real numbers,

    arriving = u B,          B[l] = b E[Q-1-l]                   what a chunk adds to the state behind it
    before   = scan over chunks with decay E[Q]                  the state in front of every chunk
    y        = [u, before] [T; C],   T[s, t] = K[t - s], s <= t;   C[:, t] = c E[t+1]

for each head one product over all chunks of all documents, so that nothing depends on how documents lie. The powers are
formed in float64, whatever their phase.

M chunks, Q tokens of a chunk, D documents, H heads, N modes, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.documents import chunk_table
from seqmodels.ops.linear_recurrence import linear_recurrence

_CHUNK = 64


def forward(
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch_size, length, heads = u.shape
    rows, modes = c.shape[0], z.shape[1]
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=u.device) * length
        lengths = torch.full_like(starts, length)
    size = min(_CHUNK, length)
    table = chunk_table(starts, lengths, batch_size * length, size)
    token_MQ = table.token
    if reverse:
        mirrored = 2 * starts[table.document] + lengths[table.document] - 1
        token_MQ = torch.where(table.valid, mirrored[:, None] - token_MQ, 0)
    tokens = u.flatten(0, 1)
    u_HMQ = torch.where(table.valid.unsqueeze(-1), tokens[token_MQ], 0).permute(2, 0, 1)

    inward_HQN, decay_HN, toeplitz_HQT, outward_HNT = _matrices(z, b, c, size, reverse)
    arriving_MC = torch.bmm(u_HMQ, inward_HQN).transpose(0, 1).reshape(1, -1, heads * modes, 2)
    counts = (lengths + size - 1) // size
    first_chunk = counts.cumsum(0) - counts
    position = (torch.arange(token_MQ.shape[0], device=u.device) - first_chunk[table.document])[None]
    chunks = Layout(first_chunk, counts, table.document[None], position)
    carried = None if initial_state is None else initial_state.flatten(1, 2)
    behind, _ = linear_recurrence(decay_HN.flatten(0, 1), arriving_MC, initial_state=carried, layout=chunks)
    behind_M = behind[0].view(-1, heads, modes, 2)
    empty = torch.zeros_like(behind_M[:1])
    opening = empty if initial_state is None else initial_state[table.document]
    before_M = torch.where(table.first.view(-1, 1, 1, 1), opening, torch.cat((empty, behind_M[:-1])))

    left_HMX = torch.cat((u_HMQ, before_M.flatten(2).transpose(0, 1)), -1)
    y_HMT = torch.bmm(left_HMX, torch.cat((toeplitz_HQT, outward_HNT), 1))
    y_MQRH = y_HMT.view(heads, -1, rows, size).permute(1, 3, 2, 0)
    if not reverse:
        y_MQRH = y_MQRH + skip * u_HMQ.permute(1, 2, 0).unsqueeze(2)
    outside = batch_size * length  # one token more takes what is none
    target = torch.where(table.valid, token_MQ, outside).flatten()
    y = u.new_zeros((outside + 1, rows, heads)).index_copy(0, target, y_MQRH.flatten(0, 1))
    y = y[:outside].view(batch_size, length, rows, heads)
    if reverse:
        return y, u.new_zeros((starts.shape[0], heads, modes, 2))
    return y, _final(tokens, z, inward_HQN, before_M, initial_state, starts, lengths, table.last)


def _matrices(z: Tensor, b: Tensor, c: Tensor, size: int, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a token leaves in the state behind its chunk, a chunk's decay, and what tokens and state give to outputs."""
    numbers = torch.complex128 if b.dtype == torch.float64 else torch.complex64
    times = torch.arange(size + 1, device=z.device)
    power_KHN = torch.exp(torch.view_as_complex(z.contiguous()) * times[:, None, None])
    power_HKN = power_KHN.to(numbers).transpose(0, 1)
    b_HN, c_RHN = torch.view_as_complex(b.contiguous()), torch.view_as_complex(c.contiguous())
    inward_HQN = torch.view_as_real(b_HN[:, None] * power_HKN[:, :size].flip(1)).flatten(2)
    weight_HRN = _signed((c_RHN * b_HN).transpose(0, 1))
    kernel_HRK = torch.bmm(weight_HRN, torch.view_as_real(power_HKN).flatten(2).transpose(1, 2))
    seen = slice(0, size) if reverse else slice(1, size + 1)
    outward_HRTN = _signed(c_RHN.transpose(0, 1)[:, :, None] * power_HKN[:, None, seen])
    lag_QT = times[:size] - times[:size, None] - int(reverse)
    toeplitz_HRQT = torch.where(lag_QT >= 0, kernel_HRK[:, :, lag_QT.clamp_min(0)], 0)
    toeplitz_HQT = toeplitz_HRQT.transpose(1, 2).flatten(2)
    return inward_HQN, torch.view_as_real(power_HKN[:, size]), toeplitz_HQT, outward_HRTN.flatten(1, 2).transpose(1, 2)


def _signed(numbers: Tensor) -> Tensor:
    """(..., N) complex as (..., 2 N) real (Re, -Im): a product with (Re, Im) is the real part of the product."""
    return torch.view_as_real(numbers.conj_physical()).flatten(-2)


def _final(
    tokens: Tensor,
    z: Tensor,
    inward_HQN: Tensor,
    before_M: Tensor,
    initial_state: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    last_chunk: Tensor,
) -> Tensor:
    """The state behind every document: its last chunk's tokens stand at the end of a chunk of their own."""
    size = inward_HQN.shape[1]
    inside_D = (lengths - 1) % size + 1
    column_Q = torch.arange(size, device=tokens.device)
    used_DQ = (column_Q >= size - inside_D[:, None]) & (lengths > 0)[:, None]
    source_DQ = torch.where(used_DQ, (starts + lengths)[:, None] - size + column_Q, 0)
    u_HDQ = torch.where(used_DQ.unsqueeze(-1), tokens[source_DQ], 0).permute(2, 0, 1)
    arriving_DHN = torch.bmm(u_HDQ, inward_HQN).unflatten(-1, (-1, 2)).transpose(0, 1)
    exponent = torch.view_as_complex(z.contiguous()) * inside_D[:, None, None]
    before = torch.view_as_complex(before_M[last_chunk].contiguous())
    kept = torch.view_as_real(torch.exp(exponent).to(before.dtype) * before)
    empty = torch.zeros_like(kept) if initial_state is None else initial_state
    return torch.where((lengths > 0).view(-1, 1, 1, 1), kept + arriving_DHN, empty)
