"""Mamba-3, token by token: the definition that every other implementation is judged by.

This is the two-term recurrence as it stands in the paper (arXiv 2603.15569, sections 3.1 to 3.3);
nothing of the chunked form is used. For one head, with a_t = e^{log_decay_t}, D_t = dt_t and
l_t = trapezoid_t:

    phi_t = phi_{t-1} + phase_step_t rate_t                                    (mod 2 pi)
    k_t,r = rotate(phi_t, norm(b_t,r) b_weight + b_bias_r)                     q from c likewise
    v_t,r = mimo_x_r x_t
    S_t   = a_t S_{t-1} + (1 - l_t) D_t a_t sum_r v_{t-1},r k_{t-1},r^T + l_t D_t sum_r v_t,r k_t,r^T
    y_t,r = S_t q_t,r + skip v_t,r
    out_t = sum_r mimo_o_r norm(y_t,r) silu(mimo_z_r z_t)

Shapes: B rows, L tokens, R ranks, G groups, H heads, N state width, P head width, A angles, D
documents. Every document starts from its own row of the initial state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.ops.documents import token_table


def normalized(x: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def rotated(x_BRHN: Tensor, angle_BHA: Tensor, pairing: str) -> Tensor:
    """Turns lane pair i by angle i: (2i, 2i+1) when adjacent, (i, i + N // 2) when half."""
    pairs, lanes = angle_BHA.shape[-1], torch.arange(x_BRHN.shape[-1], device=x_BRHN.device)
    if pairing == "adjacent":
        first, second = lanes[0 : 2 * pairs : 2], lanes[1 : 2 * pairs : 2]
    else:
        first, second = lanes[:pairs], lanes[x_BRHN.shape[-1] // 2 :][:pairs]
    cosine, sine = angle_BHA.cos()[:, None], angle_BHA.sin()[:, None]
    u, w = x_BRHN[..., first], x_BRHN[..., second]
    turned = x_BRHN.index_copy(-1, first, u * cosine - w * sine)
    return turned.index_copy(-1, second, u * sine + w * cosine)


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
    ranks, d_state, angles = b.shape[2], b.shape[-1], rate.shape[-1]
    compute, output_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32, x.dtype
    x, b, c, z = (tensor.to(compute) for tensor in (x, b, c, z))
    b_weight, c_weight, b_bias, c_bias, skip = (
        tensor.to(compute) for tensor in (b_weight, c_weight, b_bias, c_bias, skip)
    )
    if starts is None:
        starts = torch.arange(batch_size, device=x.device) * length
        lengths = torch.full_like(starts, length)
    assert lengths is not None
    documents = starts.shape[0]
    table = token_table(starts, lengths, batch_size, length)

    before = [
        x.new_zeros(shape) if given is None else given
        for given, shape in (
            (initial_angle, (documents, heads, angles)),
            (initial_ssm, (documents, heads, head_dim, d_state)),
            (initial_k, (documents, ranks, heads, d_state)),
            (initial_v, (documents, heads, head_dim)),
        )
    ]
    # A further slot collects what no document wants.
    final = [torch.cat([value, value.new_zeros(1, *value.shape[1:])]) for value in before]
    state = [torch.zeros_like(value[:1]).expand(batch_size, *value.shape[1:]) for value in before]
    ones = x.new_ones(heads, 1, head_dim)
    mix_x, mix_z, mix_o = (ones if m is None else m.to(compute) for m in (mimo_x, mimo_z, mimo_o))
    out_scale = None if norm_weight is None else norm_weight.to(compute).view(heads, head_dim)

    def keys(raw_BRGN: Tensor, weight: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
        of_heads = (normalized(raw_BRGN, epsilon) * weight).repeat_interleave(heads // raw_BRGN.shape[2], dim=2)
        return rotated(of_heads + bias.transpose(0, 1), angle, pairing)

    outputs = []
    for t in range(length):
        valid, document = table.valid[:, t], table.document[:, t]
        keep = valid[:, None, None, None]
        first = table.first[:, t]
        state = [
            torch.where(first.view(-1, *[1] * (old.dim() - 1)), start[document], old)
            for start, old in zip(before, state, strict=True)
        ]
        angle, ssm, k_before, x_before = state
        x_t, z_t = (torch.where(keep[..., 0], tensor[:, t], 0) for tensor in (x, z))
        b_t, c_t = (torch.where(keep, tensor[:, t], 0) for tensor in (b, c))
        dt_t, log_decay_t, lambda_t, step_t = (
            torch.where(valid[:, None], tensor[:, t], 0) for tensor in (dt, log_decay, trapezoid, phase_step)
        )
        increment = step_t[..., None] * torch.where(valid[:, None], rate[:, t], 0)[:, None]
        angle = angle + increment
        angle = angle - 2 * math.pi * (angle / (2 * math.pi)).round().detach()
        k_t, q_t = keys(b_t, b_weight, b_bias, angle), keys(c_t, c_weight, c_bias, angle)
        decay = log_decay_t.exp()

        def outer(x_BHP: Tensor, k_BRHN: Tensor) -> Tensor:
            return torch.einsum("hrp,bhp,brhn->bhpn", mix_x, x_BHP, k_BRHN)

        ssm = (
            decay[..., None, None] * ssm
            + ((1 - lambda_t) * dt_t * decay)[..., None, None] * outer(x_before, k_before)
            + (lambda_t * dt_t)[..., None, None] * outer(x_t, k_t)
        )
        y = torch.einsum("bhpn,brhn->bhrp", ssm, q_t) + skip[:, None, None] * mix_x * x_t[:, :, None]
        if out_scale is not None:
            y = normalized(y, epsilon) * out_scale[:, None]
        out = (mix_o * y * F.silu(mix_z * z_t[:, :, None])).sum(dim=2)
        outputs.append(torch.where(keep[..., 0], out, 0))

        # Padding keeps what was there.
        after = (angle, ssm, k_t, x_t)
        state = [
            torch.where(valid.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(after, state, strict=True)
        ]
        slot = torch.where(table.last[:, t], document, documents)
        final = [target.index_copy(0, slot, value) for target, value in zip(final, state, strict=True)]
    angle, ssm, k, v = (value[:-1] for value in final)
    return torch.stack(outputs, dim=1).to(output_dtype), angle, ssm, k, v
