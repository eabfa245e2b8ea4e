"""One decode step of Mamba-3 on a GPU, from the projected token to the gated output, in one kernel.

    phi <- phi + phase_step rate,   k_r = rotate(phi, norm(b_r) weight + bias_r),  q_r from c likewise
    S <- a S + sum_r mimo_x_r [(1 - l) D a x_before k_before,r^T + l D x k_r^T]
    out = sum_r mimo_o_r norm(S q_r + skip mimo_x_r x) silu(mimo_z_r z)

A program owns one head of one sequence: its state (head_dim x d_state, float32) is nearly all of the
traffic and is read once and written once, in runs of 16 bytes. What a step needs of single numbers
(dt, decay, phase) is computed in float64 from the projection, so that phases do not drift over long
decodes. Nothing is read on the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.mamba3.projection import FIXED_BASE
from seqmodels.ops.mamba3.triton_prologue import cosine_and_sine
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _key(
    raw, weight, bias, lanes, lane_ok, cosine, sine, epsilon,
    STATE: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Norm, weight, bias and rotation of one rank of one head, float32, in the order of ``lanes``."""
    x = tl.load(raw + lanes, mask=lane_ok, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / STATE + epsilon)
    x = x * tl.load(weight + lanes, mask=lane_ok, other=0.0) + tl.load(bias + lanes, mask=lane_ok, other=0.0)
    pairs = x.reshape(HALF, 2) if ADJACENT else tl.trans(x.reshape(2, HALF))
    u, w = tl.split(pairs)
    turned = tl.join(u * cosine - w * sine, u * sine + w * cosine)
    return turned.reshape(2 * HALF) if ADJACENT else tl.trans(turned).reshape(2 * HALF)


@triton.jit
def _row(source, head, rank, values, value_ok, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A row of (heads, ranks, head_dim) weights; 1 where there are none."""
    if source is not None:
        return tl.load(source + (head * RANK + rank) * HEAD_DIM + values, mask=value_ok, other=0.0)
    else:
        return tl.full(values.shape, 1.0, dtype=tl.float32)


@triton.jit
def _step(
    projected, dt_bias, b_weight, c_weight, b_bias, c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight,
    angle, ssm, k, v, out, a_floor, epsilon,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, STATE: tl.constexpr, HEAD_DIM: tl.constexpr,
    ANGLES: tl.constexpr, ADJACENT: tl.constexpr, HEAVY_TAIL: tl.constexpr, DATA_DEPENDENT: tl.constexpr,
    TRAPEZOID: tl.constexpr, BASE: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    slot = row * HEADS + head
    # Where things stand in a projected token: z | x | B | C | dt | A | trapezoid | theta.
    INNER: tl.constexpr = HEADS * HEAD_DIM
    KEYS: tl.constexpr = RANK * GROUPS * STATE
    SCALARS: tl.constexpr = 2 * INNER + 2 * KEYS
    THETA: tl.constexpr = SCALARS + (3 if TRAPEZOID else 2) * HEADS
    WIDTH: tl.constexpr = THETA + (ANGLES if DATA_DEPENDENT else 0)
    projected += row * WIDTH

    dt = _softplus((tl.load(projected + SCALARS + head).to(tl.float32) + tl.load(dt_bias + head)).to(tl.float64))
    raw_a = tl.load(projected + SCALARS + HEADS + head).to(tl.float64)
    if HEAVY_TAIL:  # noqa: SIM108 (a choice at compile time)
        rate_a = tl.where(raw_a >= 0, 1.0 + raw_a, 1.0 / (1.0 - tl.minimum(raw_a, 0.0)))
    else:
        rate_a = _softplus(raw_a)
    decay = tl.exp(-dt * tl.maximum(rate_a, a_floor))
    own = dt
    if TRAPEZOID:
        own = dt / (1.0 + tl.exp(-tl.load(projected + SCALARS + 2 * HEADS + head).to(tl.float64)))
    look_back = ((dt - own) * decay).to(tl.float32)
    decay = decay.to(tl.float32)
    own = own.to(tl.float32)

    angles = tl.arange(0, HALF)
    angle_ok = angles < ANGLES
    angle += slot * ANGLES + angles
    phase = tl.load(angle, mask=angle_ok, other=0.0).to(tl.float64)
    if DATA_DEPENDENT:
        theta = tl.load(projected + THETA + angles, mask=angle_ok, other=0.0).to(tl.float64)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.maximum(theta, -20.0), 20.0)) + 1.0)
        phase += tl.where(angle_ok, 3.141592653589793 * tanh * dt, 0.0)
    elif ANGLES > 0:
        phase += tl.where(angle_ok, tl.exp2(angles.to(tl.float64) * (-BASE / ANGLES)), 0.0)
    cosine, sine = cosine_and_sine(phase)
    phase -= 6.283185307179586 * tl.floor(phase * 0.15915494309189535 + 0.5)

    index = tl.arange(0, 2 * HALF)
    if ADJACENT or STATE == 2 * HALF:
        lanes, lane_ok = index, index < STATE
    else:  # u and w of "half" pairs start their own halves of the block
        lanes = tl.where(index < HALF, index, index - HALF + STATE // 2)
        lane_ok = index % HALF < STATE // 2
    values = tl.arange(0, BLOCK_P)
    value_ok = values < HEAD_DIM
    state_at = ssm + slot * (HEAD_DIM * STATE) + values[:, None] * STATE + lanes[None, :]
    state_ok = value_ok[:, None] & lane_ok[None, :]
    keys_at = (head * GROUPS // HEADS) * STATE
    z = tl.load(projected + head * HEAD_DIM + values, mask=value_ok, other=0.0).to(tl.float32)
    x = tl.load(projected + INNER + head * HEAD_DIM + values, mask=value_ok, other=0.0).to(tl.float32)
    x_before = tl.load(v + slot * HEAD_DIM + values, mask=value_ok, other=0.0)
    state = decay * tl.load(state_at, mask=state_ok, other=0.0)
    for rank in tl.static_range(RANK):
        raw = projected + 2 * INNER + rank * GROUPS * STATE + keys_at
        bias = b_bias + (head * RANK + rank) * STATE
        key = _key(raw, b_weight, bias, lanes, lane_ok, cosine, sine, epsilon, STATE, HALF, ADJACENT)
        key_at = k + ((row * RANK + rank) * HEADS + head) * STATE + lanes
        key_before = tl.load(key_at, mask=lane_ok, other=0.0)
        mix = _row(mimo_x, head, rank, values, value_ok, RANK, HEAD_DIM)
        state += (look_back * mix * x_before)[:, None] * key_before[None, :]
        state += (own * mix * x)[:, None] * key[None, :]
        # A thread may hold a copy of what another one writes: all have read before any writes.
        tl.debug_barrier()
        tl.store(key_at, key, mask=lane_ok)
    tl.store(angle, phase.to(tl.float32), mask=angle_ok)
    tl.store(v + slot * HEAD_DIM + values, x, mask=value_ok)
    tl.store(state_at, state, mask=state_ok)

    skipped = tl.load(skip + head) * x
    total = tl.zeros((BLOCK_P,), tl.float32)
    for rank in tl.static_range(RANK):
        raw = projected + 2 * INNER + KEYS + rank * GROUPS * STATE + keys_at
        bias = c_bias + (head * RANK + rank) * STATE
        query = _key(raw, c_weight, bias, lanes, lane_ok, cosine, sine, epsilon, STATE, HALF, ADJACENT)
        query = tl.where(lane_ok, query, 0.0)
        y = tl.sum(state * query[None, :], 1) + skipped * _row(mimo_x, head, rank, values, value_ok, RANK, HEAD_DIM)
        if norm_weight is not None:
            y *= tl.rsqrt(tl.sum(y * y, 0) / HEAD_DIM + epsilon)
            y *= _row(norm_weight, head, 0, values, value_ok, 1, HEAD_DIM)
        gate = z * _row(mimo_z, head, rank, values, value_ok, RANK, HEAD_DIM)
        total += y * gate * tl.sigmoid(gate) * _row(mimo_o, head, rank, values, value_ok, RANK, HEAD_DIM)
    tl.store(out + slot * HEAD_DIM + values, total, mask=value_ok)


_MIXES = ("mimo_x", "mimo_z", "mimo_o")
_CONSTANTS = {
    "HEADS": 32, "GROUPS": 1, "RANK": 1, "STATE": 128, "HEAD_DIM": 64, "ANGLES": 32, "ADJACENT": True,
    "HEAVY_TAIL": True, "DATA_DEPENDENT": True, "TRAPEZOID": True, "BASE": 0.0, "HALF": 64, "BLOCK_P": 64,
}  # fmt: skip
STEP = KernelSpec(
    name="mamba3.step",
    function=_step,
    signature={
        "projected": "*{dtype}",
        **dict.fromkeys(("dt_bias", "b_weight", "c_weight", "b_bias", "c_bias", "skip", *_MIXES), "*fp32"),
        **dict.fromkeys(("norm_weight", "angle", "ssm", "k", "v"), "*fp32"),
        "out": "*{dtype}",
        "a_floor": "fp32",
        "epsilon": "fp32",
    },
    # A thread holds 32 numbers of the state, beside rows of the ranks.
    tiles=(Tile({}, num_warps=8, num_stages=1), Tile({}, num_warps=4, num_stages=1)),
    variants=(
        {**_CONSTANTS, **dict.fromkeys(_MIXES), "norm_weight": None},
        {**_CONSTANTS, "RANK": 4, "ADJACENT": False},
        {**_CONSTANTS, "STATE": 64, "HALF": 32, "ANGLES": 16, **dict.fromkeys(_MIXES)},
        {**_CONSTANTS, "STATE": 64, "HALF": 32, "ANGLES": 16, "RANK": 4, "ADJACENT": False},
    ),
    valid=lambda tile, variant, dtype: (tile.num_warps == 4) == (variant["HALF"] <= 32 and variant["RANK"] == 1),
)
KERNELS = [STEP]


def supports(projected: Tensor, *rest: object) -> str | None:
    b_bias, v = rest[3], rest[13]
    assert isinstance(b_bias, Tensor)
    assert isinstance(v, Tensor)
    if projected.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it computes in bfloat16, float16 or float32, not {projected.dtype}"
    if b_bias.shape[-1] % 2:
        return f"it holds the lanes of the state in pairs; d_state is {b_bias.shape[-1]}"
    if max(b_bias.shape[-1], v.shape[-1]) > 128:
        return f"it holds head_dim and d_state up to 128, not {v.shape[-1]} and {b_bias.shape[-1]}"
    return None


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
    projected = projected.contiguous()
    heads, ranks, state = b_bias.shape
    batch_size, _, head_dim = v.shape
    weights = (dt_bias, b_weight, c_weight, b_bias, c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight)
    constants: dict[str, Any] = {
        "HEADS": heads, "GROUPS": num_groups, "RANK": ranks, "STATE": state, "HEAD_DIM": head_dim,
        "ANGLES": angle.shape[-1], "ADJACENT": pairing == "adjacent", "HEAVY_TAIL": a_activation == "heavy_tail",
        "DATA_DEPENDENT": rotation == "data_dependent", "TRAPEZOID": trapezoid, "BASE": math.log2(FIXED_BASE),
        "HALF": max(8, triton.next_power_of_2(state // 2)), "BLOCK_P": max(8, triton.next_power_of_2(head_dim)),
    }  # fmt: skip
    tile = STEP.tile(device_properties(projected.device.index), constants, dtype_name(projected.dtype))
    out = projected.new_empty((batch_size, heads * head_dim))
    _step[(batch_size * heads,)](
        projected, *(None if weight is None else weight.contiguous() for weight in weights),
        angle, ssm, k, v, out, a_floor, epsilon, **constants, **tile.launch(),
    )  # fmt: skip
    return out
