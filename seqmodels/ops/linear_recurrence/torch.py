"""Linear recurrence in plain PyTorch: two levels of about sqrt(length) steps each, no host reads.

Time is cut into n chunks of Q tokens. Q steps, each on all chunks at once, give the recurrence inside
every chunk and the running product p of its decays; n steps add p times the state before the chunk.
Only products of decays occur, no quotient and no logarithm, so any decay is fine, zero included.

Documents are part of the numbers: on a document's first token the decay is 0 and decay times initial
state is added to x; padding has decay 0 and x 0. The backward is the same recurrence in reversed
time, g[t] = dL/dh[t] + conj(decay[t+1]) g[t+1].

B rows, L columns, C channels (complex inside, where x holds pairs), D documents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqmodels.ops.documents import token_table
from seqmodels.ops.linear_recurrence.numbers import components_of, numbers_of


def forward(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    a, b = numbers_of(decay, x), numbers_of(x, x)
    state = None if initial_state is None else numbers_of(initial_state, x)
    if starts is None or lengths is None:
        h = _scan(a, b, state)
        final_state = h[:, -1]
    else:
        table = token_table(starts, lengths, *x.shape[:2])
        inner = (table.valid & ~table.first).unsqueeze(-1)
        b = torch.where(table.valid.unsqueeze(-1), b, 0)
        if state is not None:
            b = b + torch.where(table.first.unsqueeze(-1), a * state[table.document], 0)
        h = _scan(torch.where(inner, a, 0), b, None)
        last_D, used_D1 = (starts + lengths - 1).clamp(0, h.shape[0] * h.shape[1] - 1), (lengths > 0).unsqueeze(-1)
        empty = torch.zeros_like(h[0, :1]) if state is None else state
        final_state = torch.where(used_D1, h.flatten(0, 1)[last_D], empty)
    return components_of(h).contiguous(), components_of(final_state).clone(memory_format=torch.contiguous_format)


def backward(
    grad_h: Tensor,
    grad_final: Tensor,
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    states: Tensor,
    final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    a, h = numbers_of(decay, x).conj_physical(), numbers_of(states, x)
    state = None if initial_state is None else numbers_of(initial_state, x)
    incoming, at_end = numbers_of(grad_h, x), numbers_of(grad_final, x)
    constant = decay.dim() != x.dim()
    before = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), 1)
    if starts is None or lengths is None:
        if state is not None:
            before[:, 0] = state
        incoming = incoming.clone()
        incoming[:, -1] += at_end
        g = _scan(a if constant else _next(a).flip(1), incoming.flip(1), None).flip(1)
        grad_state = (a if constant else a[:, 0]) * g[:, 0]
    else:
        table = token_table(starts, lengths, *x.shape[:2])
        inner = (table.valid & ~table.first).unsqueeze(-1)
        incoming = torch.where(table.valid.unsqueeze(-1), incoming, 0)
        incoming = torch.where(table.last.unsqueeze(-1), incoming + at_end[table.document], incoming)
        g = _scan(_next(torch.where(inner, a, 0)).flip(1), incoming.flip(1), None).flip(1)
        before = torch.where(inner, before, 0)
        if state is not None:
            before = torch.where(table.first.unsqueeze(-1), state[table.document], before)
        first_D, used_D1 = starts.clamp(max=h.shape[0] * h.shape[1] - 1), (lengths > 0).unsqueeze(-1)
        first_decay = a if constant else a.flatten(0, 1)[first_D]
        grad_state = torch.where(used_D1, first_decay * g.flatten(0, 1)[first_D], at_end)
    grad_decay = g * before.conj_physical()
    if constant:
        grad_decay = grad_decay.sum((0, 1))
    elif starts is not None:
        grad_decay = torch.where(table.valid.unsqueeze(-1), grad_decay, 0)
    found = [components_of(value).contiguous() for value in (grad_decay, g)]
    empty = grad_h.new_empty(0)
    return found[0], found[1], empty if initial_state is None else components_of(grad_state)


def _next(a: Tensor) -> Tensor:
    """a[t + 1], and 0 behind the end."""
    return torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), 1)


def _scan(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] over dimension 1 of b (B, L, C); a is b's shape, or (C,)."""
    batch_size, length, channels = b.shape
    size = math.isqrt(length - 1) + 1
    count = -(-length // size)
    h = b.new_zeros((batch_size, count * size, channels))
    h[:, :length] = b
    if state is not None:
        h[:, 0] += (a if a.dim() == 1 else a[:, 0]) * state
    h = h.view(batch_size, count, size, channels)
    if a.dim() == 1:
        products = a.expand(size, channels).cumprod(0)
        for t in range(1, size):
            h[:, :, t] += a * h[:, :, t - 1]
        for chunk in range(1, count):
            h[:, chunk] += products * h[:, chunk - 1, -1:]
    else:
        products = b.new_zeros((batch_size, count * size, channels))
        products[:, :length] = a
        decays = products.view_as(h)
        products = decays.clone()
        for t in range(1, size):
            h[:, :, t] += decays[:, :, t] * h[:, :, t - 1]
            products[:, :, t] *= products[:, :, t - 1]
        for chunk in range(1, count):
            h[:, chunk] += products[:, chunk] * h[:, chunk - 1, -1:]
    return h.flatten(1, 2)[:, :length]
