"""Gradients to a diagonal SSM's constants from sums over time.

With x the states of inputs of weight 1 from nothing, h those of the initial state alone, a prime for d/dz, g the
gradient to an output and f to a final state (its conjugate), for each head and mode

    grad c = sum g (b x + h),   grad b = c sum g x + f x_last,   grad z = b (c sum g x' + f x'_last) + the same of h

conjugated: the gradient to a complex number is the pair (dL/dRe, dL/dIm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.ops.diagonal_ssm.streams import Streams
from seqmodels.ops.diagonal_ssm.tables import MODES, SIZE, conjugate, grouped, in_two_parts, powers_of
from seqmodels.ops.diagonal_ssm.triton_sums import SumTables, ends, lags, sums


def constants(
    grad_y: Tensor,
    adjoint: Tensor | None,
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    streams: Streams,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad z, grad b, grad c, grad skip); adjoint (documents, heads, modes, 2) is f."""
    rows = range(c.shape[0])
    lag_RHQ = torch.stack([lags(u, streams, grad_y[:, :, row], mirror=reverse) for row in rows])
    grad_z, grad_b, grad_c = [], [], []
    for first in range(0, z.shape[1], MODES):
        modes = slice(first, min(first + MODES, z.shape[1]))
        b_HN, c_RHN = _numbers(b[:, modes]), _numbers(c[:, :, modes])
        f_DHN = None if adjoint is None else _numbers(adjoint[:, :, modes])
        from_u = _Sums(u, grad_y, z[:, modes], None, streams, lag_RHQ, reverse=reverse)
        c_part = b_HN * from_u.x_RHN
        z_part = b_HN * from_u.through(c_RHN, f_DHN, derivative=True)
        if initial_state is not None:
            carried = _Sums(None, grad_y, z[:, modes], initial_state[:, :, modes], streams, lag_RHQ, reverse=reverse)
            c_part = c_part + carried.x_RHN
            z_part = z_part + carried.through(c_RHN, f_DHN, derivative=True)
        grad_z.append(z_part)
        grad_b.append(from_u.through(c_RHN, f_DHN, derivative=False))
        grad_c.append(c_part)
    grad_skip = torch.zeros_like(lag_RHQ[..., 0]) if reverse else lag_RHQ[..., 0]
    return _pairs(grad_z).to(z.dtype), _pairs(grad_b).to(b.dtype), _pairs(grad_c).to(c.dtype), grad_skip.to(u.dtype)


class _Sums:
    """sum g x and sum g x' of every row (rows, heads, modes), and x, x' behind every document but with reverse; of
    u, or without it of the initial state; complex128."""

    def __init__(
        self,
        u: Tensor | None,
        grad_y: Tensor,
        z: Tensor,
        initial_state: Tensor | None,
        streams: Streams,
        lag_RHQ: Tensor,
        *,
        reverse: bool,
    ) -> None:
        modes = z.shape[1]
        power = powers_of(z)[:, 0]
        inward = power[:, :SIZE].flip(1)
        parts = (
            inward.real, inward.imag, *in_two_parts(power[:, SIZE]), power[:, :SIZE].real, power[:, :SIZE].imag
        )  # fmt: skip
        tables = SumTables(*(part.float().contiguous() for part in parts))
        before = None if initial_state is None else _opening(initial_state)
        rows = [grad_y[:, :, row] for row in range(grad_y.shape[2])]
        if streams.segments > 1:
            shape = (streams.documents, streams.segments, z.shape[0], 4, MODES)
            nothing = grad_y.new_zeros(shape) if u is None else ends(u, tables, None, streams, u, mirror=reverse)
            before = _before(streams, z, nothing, before)
        found = [sums(u, tables, before, streams, g, mirror=reverse) for g in rows]
        self.x_RHN, self.dx_RHN = (part[..., :modes] for part in _complex(torch.stack(found)))
        if not reverse:  # g reads the state behind its token: one decay later
            decay = power[:, 1, :modes]
            self.x_RHN, self.dx_RHN = decay * self.x_RHN, decay * (self.dx_RHN + self.x_RHN)
        if u is not None:
            lag = lag_RHQ.to(power.dtype)
            seen = F.pad(lag[..., 1:], (0, 1)) if reverse else lag  # with reverse the lag of 1 is the power 0
            times = torch.arange(SIZE, device=z.device)
            self.x_RHN = self.x_RHN + torch.einsum("rhl,hln->rhn", seen, power[:, :SIZE, :modes])
            self.dx_RHN = self.dx_RHN + torch.einsum("rhl,hln->rhn", seen * times, power[:, :SIZE, :modes])
        if not reverse:
            behind = ends(u, tables, before, streams, rows[0], mirror=reverse)
            self.last, self.last_derivative = (part[..., :modes] for part in _complex(streams.last(behind)))

    def through(self, c_RHN: Tensor, f_DHN: Tensor | None, *, derivative: bool) -> Tensor:
        """c sum g x + f x_last, or of the derivatives."""
        total = (c_RHN * (self.dx_RHN if derivative else self.x_RHN)).sum(0)
        if f_DHN is None:
            return total
        return total + (f_DHN * (self.last_derivative if derivative else self.last)).sum(0)


def _opening(initial_state: Tensor) -> Tensor:
    """(documents, heads, modes, 2) as (documents, heads, 4, 16), of derivative zero."""
    states = F.pad(initial_state, (0, 0, 0, MODES - initial_state.shape[2])).transpose(-1, -2)
    return torch.cat((states, torch.zeros_like(states)), 2).contiguous()


def _before(streams: Streams, z: Tensor, behind: Tensor, opening: Tensor | None) -> Tensor:
    """x and x' in front of every segment: x' takes a segment's length times x through its decay."""
    x, dx = (part.unsqueeze(3) for part in behind.split(2, 3))
    x_open, dx_open = (None, None) if opening is None else (part.unsqueeze(2) for part in opening.split(2, 2))
    x_before = streams.before(z, x, x_open)
    decay = torch.exp(streams.segment * grouped(z))
    moved = streams.segment * decay * torch.complex(*x_before.double().unbind(-2))
    dx_before = streams.before(z, dx + torch.stack((moved.real, moved.imag), -2).float(), dx_open)
    return torch.cat((x_before.squeeze(3), dx_before.squeeze(3)), 3).contiguous()


def _complex(parts: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 4, 16) as two complex numbers."""
    real, imaginary, real_d, imaginary_d = parts.double().unbind(-2)
    return torch.complex(real, imaginary), torch.complex(real_d, imaginary_d)


def _numbers(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.double().contiguous())


def _pairs(parts: list[Tensor]) -> Tensor:
    return conjugate(torch.view_as_real(torch.cat(parts, -1)))
