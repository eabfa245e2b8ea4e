"""What stands where in the input projection of a Mamba-3 layer, and the activations on it.

``projected`` is z[E] | x[E] | B[R G N] | C[R G N] | dt[H] | A[H] | trapezoid[H] | theta[A], with
E = H P, as in the released checkpoints. Whole sequences are unpacked here into what
:func:`seqmodels.ops.mamba3.mamba3` takes; decode kernels read ``projected`` themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.ops.registration import state_dtype

A_ACTIVATIONS = ("heavy_tail", "softplus")
ROTATIONS = ("data_dependent", "fixed", "none")
FIXED_BASE = 10000.0


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x >= 0 and 1 / (1 - x) below: positive, smooth at 0, and near 0 only like 1 / |x|."""
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp_max(0)))


class Recurrence(NamedTuple):
    """Arguments of :func:`seqmodels.ops.mamba3.mamba3` that a layer projects from its input."""

    x: Tensor
    b: Tensor
    c: Tensor
    z: Tensor
    dt: Tensor
    log_decay: Tensor
    trapezoid: Tensor
    rate: Tensor
    phase_step: Tensor


class Projection(NamedTuple):
    """Sizes and activations of the projected input.

    Attributes:
        a_activation: f in a = min(-f(A), -a_floor). "heavy_tail" is 1 + u for u >= 0 and
            1 / (1 - u) below; "softplus" is what releases before June 2026 computed.
        rotation: "data_dependent" turns pair i by pi tanh(theta_i) dt in each step; "fixed" by
            10000^(-i / angles), the standard rotary positions; "none" has no angles.
        trapezoid: False fixes the trapezoid weight to 1 (the exponential Euler rule of Mamba-2).
            The projection has no rows for what is fixed.
    """

    num_heads: int
    head_dim: int
    d_state: int
    num_groups: int
    ranks: int
    angles: int
    a_activation: str
    a_floor: float
    rotation: str
    trapezoid: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of z, x, B, C, dt, A, trapezoid and theta."""
        inner, keys = self.num_heads * self.head_dim, self.ranks * self.num_groups * self.d_state
        return (
            inner,
            inner,
            keys,
            keys,
            self.num_heads,
            self.num_heads,
            self.num_heads if self.trapezoid else 0,
            self.angles if self.rotation == "data_dependent" else 0,
        )

    def unpack(self, projected: Tensor, dt_bias: Tensor) -> Recurrence:
        """(batch, length, width) to the recurrence's arguments.

        dt = softplus(. + dt_bias), log_decay = dt a, trapezoid = sigmoid(.), rate = pi tanh(theta);
        all in float32 (float64 beside float64).
        """
        z, x, b, c, *rest = projected.split(self.widths, dim=-1)
        wide = state_dtype(projected.dtype)
        raw_dt, raw_a, raw_trapezoid, theta = (part.to(wide) for part in rest)
        dt = F.softplus(raw_dt + dt_bias.to(wide))
        activation = heavy_tail if self.a_activation == "heavy_tail" else F.softplus
        log_decay = dt * -activation(raw_a).clamp_min(self.a_floor)
        trapezoid = raw_trapezoid.sigmoid() if self.trapezoid else torch.ones_like(dt)
        phase_step = dt
        if self.rotation == "data_dependent":
            rate = torch.pi * theta.tanh()
        else:
            lane = torch.arange(self.angles, dtype=wide, device=projected.device)
            rate = (FIXED_BASE ** (-lane / max(self.angles, 1))).expand(*projected.shape[:-1], -1)
            phase_step = torch.ones_like(dt)
        heads, keys = (self.num_heads, self.head_dim), (self.ranks, self.num_groups, self.d_state)
        return Recurrence(
            x.unflatten(-1, heads),
            b.unflatten(-1, keys),
            c.unflatten(-1, keys),
            z.unflatten(-1, heads),
            dt,
            log_decay,
            trapezoid,
            rate,
            phase_step,
        )
