"""A diagonal SSM by Triton kernels: products with small matrices, states carried in registers.

Bytes of device memory a token and head, in float32, for up to 32 modes and one row of c: 8 forward (u, y), 8 for the
gradient to u; the gradients to the constants 8, and 12 for each 16 modes. Every further 32 modes, and every row, cost
as much again, and 4 more for the y that they add to. Where documents are few they are cut into segments, and a first
pass over the inputs (4 bytes) makes the state in front of each.

The gradient to u is the same map from the other end, with b and c exchanged. The gradients to the constants need no
state of the forward: they come from x and dx/dz, carried forward in time beside the gradient to y (see
:mod:`seqmodels.ops.diagonal_ssm.triton_gradient`). Sums have one order; nothing is atomic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.diagonal_ssm import triton_gradient
from seqmodels.ops.diagonal_ssm.streams import Streams, plan
from seqmodels.ops.diagonal_ssm.tables import MODES, conjugate, grouped_pairs, tables_of, ungrouped_pairs
from seqmodels.ops.diagonal_ssm.triton_outputs import outputs

_MOST = 2**31 - 1  # offsets inside a row are 32 bits


def supports(u: Tensor, z: Tensor, b: Tensor, c: Tensor, *rest: object) -> str | None:
    if u.dtype != torch.float32:
        return f"the Triton kernels take float32; u is {u.dtype}"
    if u.shape[1] * u.shape[2] * c.shape[0] > _MOST:
        return f"the Triton kernels take at most {_MOST} outputs a row; got u {tuple(u.shape)}, {c.shape[0]} rows of c"
    return None


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
    u = u.contiguous()
    streams = plan(u, starts, lengths)
    y = _outside_zero(u, c.shape[0], lengths)
    finals = [
        _scan(u, z, b, weight, direct, initial_state, streams, y[:, :, row], mirror=reverse, strict=reverse)
        for row, (weight, direct) in enumerate(zip(c, skip, strict=True))
    ]
    return y, torch.zeros_like(finals[0]) if reverse else finals[0]


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    u, grad_y = u.contiguous(), grad_y.contiguous()
    streams = plan(u, starts, lengths)
    grad_u = _outside_zero(u, 1, lengths)[:, :, 0]
    adjoint = None if reverse else conjugate(grad_final)
    grad_initial = None
    for row, (weight, direct) in enumerate(zip(c, skip, strict=True)):
        state = adjoint if row == 0 else None
        behind = _scan(
            grad_y[:, :, row], z, weight, b, direct, state, streams, grad_u,
            mirror=not reverse, strict=reverse, early=not reverse, add=row > 0,
        )  # fmt: skip
        grad_initial = behind if grad_initial is None else grad_initial + behind
    constants = triton_gradient.constants(grad_y, adjoint, u, z, b, c, initial_state, streams, reverse=reverse)
    empty = grad_y.new_empty(0)
    return grad_u, *constants, empty if initial_state is None or grad_initial is None else conjugate(grad_initial)


def _outside_zero(u: Tensor, rows: int, lengths: Tensor | None) -> Tensor:
    """(batch, length, rows, heads) for outputs; kernels write no token outside documents."""
    shape = (*u.shape[:2], rows, u.shape[2])
    return u.new_empty(shape) if lengths is None else u.new_zeros(shape)


def _scan(
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None,
    streams: Streams,
    y: Tensor,
    *,
    mirror: bool,
    strict: bool,
    early: bool = False,
    add: bool = False,
) -> Tensor:
    """Writes y for one row of c; the last state of every document."""
    finals = []
    for first in range(0, z.shape[1], 2 * MODES):
        modes = slice(first, first + 2 * MODES)
        z_part = z[:, modes]
        tables = tables_of(z_part, b[:, modes], c[:, modes], skip if first == 0 else None, strict=strict, early=early)
        before = None if initial_state is None else grouped_pairs(initial_state[:, :, modes])
        if streams.segments > 1:
            ends = outputs(u, tables, None, streams, None, mirror=mirror)
            before = streams.before(z_part, ends, before)
        ends = outputs(u, tables, before, streams, y, mirror=mirror, add=add or first > 0)
        finals.append(ungrouped_pairs(streams.last(ends), z_part.shape[1]))
    return finals[0] if len(finals) == 1 else torch.cat(finals, 2)
