"""One decode step of Mamba-3 in plain PyTorch: one batched matrix product updates the state.

Both terms of the recurrence, for all R ranks, are one product of 2R columns and 2R rows:

    S <- a S + [ (1 - l) D a v_{t-1},  l D v_t ] [ k_{t-1}; k_t ]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.ops.mamba3.projection import Projection


def _rotated(x_BRHN: Tensor, cosine_B1HA: Tensor, sine_B1HA: Tensor, pairing: str) -> Tensor:
    pairs, half, turned = cosine_B1HA.shape[-1], x_BRHN.shape[-1] // 2, x_BRHN.clone()
    lanes = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if pairing == "adjacent"
        else (slice(0, pairs), slice(half, half + pairs))
    )
    u, w = (x_BRHN[..., lane] for lane in lanes)
    turned[..., lanes[0]] = u * cosine_B1HA - w * sine_B1HA
    turned[..., lanes[1]] = u * sine_B1HA + w * cosine_B1HA
    return turned


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
    head_dim = v.shape[-1]
    projection = Projection(
        heads, head_dim, d_state, num_groups, ranks, angle.shape[-1], a_activation, a_floor, rotation, trapezoid
    )
    token = projection.unpack(projected[:, None], dt_bias)
    x, b, c, z = (part[:, 0].to(ssm.dtype) for part in token[:4])
    dt, log_decay, weight, rate, phase_step = (part[:, 0] for part in token[4:])

    total = angle.double() + phase_step.double()[..., None] * rate.double()[:, None]
    angle.copy_(total - 2 * math.pi * (total / (2 * math.pi)).round())
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]

    def keys(raw_BRGN: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        normed = F.rms_norm(raw_BRGN, (d_state,), scale, epsilon)
        of_heads = normed.repeat_interleave(heads // num_groups, dim=2) + bias.transpose(0, 1)
        return _rotated(of_heads, cosine, sine, pairing)

    k_now, q = keys(b, b_weight, b_bias), keys(c, c_weight, c_bias)
    decay, own = log_decay.exp(), weight * dt
    values = torch.stack((((dt - own) * decay)[..., None] * v, own[..., None] * x), dim=1)  # (B, 2, H, P)
    mixed = values[:, :, None] if mimo_x is None else values[:, :, None] * mimo_x.transpose(0, 1)
    columns = mixed.flatten(1, 2).permute(0, 2, 3, 1)  # (B, H, P, 2R)
    rows = torch.cat((k, k_now), dim=1).transpose(1, 2)  # (B, H, 2R, N)
    ssm.mul_(decay[..., None, None])
    ssm.view(-1, head_dim, d_state).baddbmm_(columns.flatten(0, 1), rows.flatten(0, 1))
    k.copy_(k_now)
    v.copy_(x)

    own_x = x[:, None] if mimo_x is None else x[:, None] * mimo_x.transpose(0, 1)
    y = torch.einsum("bhpn,brhn->brhp", ssm, q) + skip[:, None] * own_x
    if norm_weight is not None:
        y = F.rms_norm(y, (head_dim,), None, epsilon) * norm_weight.view(heads, head_dim)
    gate = z[:, None] if mimo_z is None else z[:, None] * mimo_z.transpose(0, 1)
    out = y * F.silu(gate)
    if mimo_o is not None:
        out = out * mimo_o.transpose(0, 1)
    return out.sum(dim=1).flatten(1).to(projected.dtype)
