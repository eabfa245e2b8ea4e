"""One decode step of Mamba-3 by the definition in ``reference.py``."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.mamba3 import reference
from seqmodels.ops.mamba3.projection import Projection


def forward(
    projected: Tensor,
    dt_bias: Tensor,
    b_weight: Tensor,
    c_weight: Tensor,
    b_bias: Tensor,
    c_bias: Tensor,
    skip: Tensor,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    norm_weight: Tensor | None,
    angle: Tensor,
    ssm: Tensor,
    k: Tensor,
    v: Tensor,
    num_groups: int,
    pairing: str,
    a_activation: str,
    a_floor: float,
    rotation: str,
    trapezoid: bool,
    epsilon: float,
) -> Tensor:
    heads, ranks, d_state = b_bias.shape
    projection = Projection(
        heads, v.shape[-1], d_state, num_groups, ranks, angle.shape[-1], a_activation, a_floor, rotation, trapezoid
    )
    token = projection.unpack(projected[:, None], dt_bias)
    out, *after = reference.forward(
        *token[:7], token.phase_step, token.rate, b_weight, c_weight, b_bias, c_bias, skip, mimo_x, mimo_z, mimo_o,
        norm_weight, angle, ssm, k, v, None, None, pairing, epsilon, 1,
    )  # fmt: skip
    for old, new in zip((angle, ssm, k, v), after, strict=True):
        old.copy_(new)
    return out.flatten(1)
