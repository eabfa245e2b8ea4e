"""One decode step of feature attention on a GPU.

    S <- e^g S + phi(k) [v, 1]^T,    y = (phi(q) S)[values] / ((phi(q) S)[last] + epsilon)

The state is nearly all of the traffic: 8 F (P + 1) bytes a head, read once and written once. A program
owns one head of one sequence and walks its values in blocks of BLOCK_V; the features of both tokens are
made from q and k once, each as one vector over all F features, which stay in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.feature_attention.maps import feature_width
from seqmodels.ops.feature_attention.triton_maps import LOG2E, NO_KEY
from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Tile, device_properties

MAX_FEATURES = 256


@triton.jit
def _entry(x, weight, index, head, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """u at ``index`` (any number of entries of u): x W, or x itself without a weight."""
    if weight is None:
        u = tl.load(x + index).to(tl.float32)
    else:
        depth = tl.arange(0, BLOCK_D)
        inside = (depth < DIM)[None, :]
        row = tl.load(x + depth, mask=depth < DIM, other=0.0).to(tl.float32)
        at = weight + head * (DIM * WIDTH) + depth[None, :] * WIDTH + index[:, None]
        u = tl.sum(tl.load(at, mask=inside, other=0.0) * row[None, :], 1)
    return u


@triton.jit
def _features(
    x, weight, head, FEATURE_MAP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """phi of one token, all features in the order of memory; log phi for hedgehog_exp; zero (NO_KEY) in the padding."""
    lanes = tl.arange(0, BLOCK_F)
    real = lanes < FEATURES
    if FEATURE_MAP == "taylor":
        # Row a of the pairs starts at 1 + WIDTH + a WIDTH - a (a - 1) / 2: a is the number of rows begun, less one.
        pair = lanes - 1 - WIDTH
        a = tl.zeros((BLOCK_F,), dtype=tl.int32)
        for row in tl.static_range(1, WIDTH):
            a += (pair >= row * WIDTH - row * (row - 1) // 2).to(tl.int32)
        b = pair - (a * WIDTH - a * (a - 1) // 2) + a
        is_pair = real & (pair >= 0)
        linear = (lanes >= 1) & (lanes <= WIDTH)
        first = _entry(x, weight, tl.where(is_pair, a, tl.where(linear, lanes - 1, 0)), head, DIM, WIDTH, BLOCK_D)
        second = _entry(x, weight, tl.where(is_pair, b, 0), head, DIM, WIDTH, BLOCK_D)
        pairs = first * second * tl.where(a == b, (2 * WIDTH) ** -0.5, WIDTH**-0.5)
        phi = tl.where(is_pair, pairs, tl.where(linear, first * WIDTH**-0.25, tl.where(lanes == 0, 1.0, 0.0)))
    else:
        u = _entry(x, weight, tl.where(real, lanes % WIDTH, 0), head, DIM, WIDTH, BLOCK_D)
        u = tl.where(lanes < WIDTH, u, -u)
        if FEATURE_MAP == "hedgehog_exp":
            phi = tl.where(real, u, NO_KEY)
        elif FEATURE_MAP == "hedgehog_joint":
            top = tl.max(tl.where(real, u, NO_KEY), 0)
            phi = tl.where(real, tl.exp2((u - top) * LOG2E), 0.0)
            phi /= tl.sum(phi, 0)
        elif FEATURE_MAP == "hedgehog_split":
            upper, lower = lanes < WIDTH, real & (lanes >= WIDTH)
            top = tl.where(upper, tl.max(tl.where(upper, u, NO_KEY), 0), tl.max(tl.where(lower, u, NO_KEY), 0))
            phi = tl.where(real, tl.exp2((u - top) * LOG2E), 0.0)
            phi /= tl.where(upper, tl.sum(tl.where(upper, phi, 0.0), 0), tl.sum(tl.where(lower, phi, 0.0), 0))
        elif FEATURE_MAP == "elu":
            phi = tl.where(real, tl.where(u > 0, u + 1, tl.exp2(tl.minimum(u, 0.0) * LOG2E)), 0.0)
        elif FEATURE_MAP == "relu":
            phi = tl.where(real, tl.maximum(u, 0.0), 0.0)
        else:
            phi = tl.where(real, u, 0.0)
    return phi


@triton.jit
def _step(
    query, key, value, query_weight, key_weight, log_decay, state, log_scale, output,
    heads, query_heads, key_heads, epsilon,
    FEATURE_MAP: tl.constexpr, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    FEATURES: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = VALUE_DIM + 1 if NORMALIZE else VALUE_DIM
    slot = tl.program_id(0).to(tl.int64)
    row, head = slot // heads, slot % heads
    query += (row * query_heads + head * query_heads // heads) * KEY_DIM
    key += (row * key_heads + head * key_heads // heads) * KEY_DIM
    lanes = tl.arange(0, BLOCK_F)
    real = lanes < FEATURES
    query_phi = _features(query, query_weight, head, FEATURE_MAP, KEY_DIM, WIDTH, FEATURES, BLOCK_D, BLOCK_F)
    key_phi = _features(key, key_weight, head, FEATURE_MAP, KEY_DIM, WIDTH, FEATURES, BLOCK_D, BLOCK_F)
    carry = tl.full((BLOCK_F,), 1.0, dtype=tl.float32)
    if log_decay is not None:
        carry *= tl.exp2(tl.load(log_decay + slot) * LOG2E)
    if log_scale is not None:
        before = tl.load(log_scale + slot * FEATURES + lanes, mask=real, other=NO_KEY)
        risen = tl.maximum(before, key_phi)
        carry = tl.exp2((before - risen) * LOG2E)
        key_phi = tl.where(real, tl.exp2((key_phi - risen) * LOG2E), 0.0)
        query_phi += risen
        query_phi = tl.exp2((query_phi - tl.max(query_phi, 0)) * LOG2E)

    state += slot * (FEATURES * COLUMNS)
    if NORMALIZE:
        column_at = state + lanes * COLUMNS + VALUE_DIM
        column = tl.load(column_at, mask=real, other=0.0) * carry + key_phi
        total = tl.sum(query_phi * column, 0) + epsilon
    for start in tl.static_range(0, VALUE_DIM, BLOCK_V):
        values = start + tl.arange(0, BLOCK_V)
        value_ok = values < VALUE_DIM
        v = tl.load(value + slot * VALUE_DIM + values, mask=value_ok, other=0.0).to(tl.float32)
        tile_at = state + lanes[:, None] * COLUMNS + values[None, :]
        tile_ok = real[:, None] & value_ok[None, :]
        new = tl.load(tile_at, mask=tile_ok, other=0.0) * carry[:, None] + key_phi[:, None] * v[None, :]
        y = tl.sum(query_phi[:, None] * new, 0)
        if NORMALIZE:
            y /= total
        tl.store(output + slot * VALUE_DIM + values, y, mask=value_ok)
        # A thread may hold a copy of what another one writes: all have read before any writes.
        tl.debug_barrier()
        tl.store(tile_at, new, mask=tile_ok)
    tl.debug_barrier()
    if NORMALIZE:
        tl.store(column_at, column, mask=real)
    if log_scale is not None:
        tl.store(log_scale + slot * FEATURES + lanes, risen, mask=real)


def _constants(feature_map: str, depth: int, width: int, value_dim: int, normalize: bool) -> dict[str, Any]:
    features = feature_width(feature_map, width)
    return {
        "FEATURE_MAP": "relu" if feature_map == "t2r" else feature_map, "KEY_DIM": depth, "WIDTH": width,
        "VALUE_DIM": value_dim, "FEATURES": features, "NORMALIZE": normalize,
        "BLOCK_D": triton.next_power_of_2(depth), "BLOCK_F": triton.next_power_of_2(features),
    }  # fmt: skip


_PLAIN = dict.fromkeys(("query_weight", "key_weight"))
_NO_DECAY, _NO_SCALE = {"log_decay": None}, {"log_scale": None}
STEP = KernelSpec(
    name="feature_attention.step",
    function=_step,
    signature={
        **dict.fromkeys(("query", "key", "value", "output"), "*{dtype}"),
        **dict.fromkeys(("query_weight", "key_weight", "log_decay", "state", "log_scale"), "*fp32"),
        **dict.fromkeys(("heads", "query_heads", "key_heads"), "i32"),
        "epsilon": "fp32",
    },
    tiles=(Tile({"BLOCK_V": 16}, num_warps=4, num_stages=1),),
    variants=(
        _constants("taylor", 16, 16, 64, True) | _PLAIN | _NO_DECAY | _NO_SCALE,
        _constants("taylor", 16, 16, 64, True) | _PLAIN | _NO_SCALE,
        _constants("hedgehog_split", 64, 64, 64, True) | _NO_DECAY | _NO_SCALE,
        _constants("hedgehog_split", 128, 64, 128, True) | _NO_DECAY | _NO_SCALE,
        _constants("hedgehog_exp", 64, 64, 64, True) | _NO_DECAY,
        _constants("hedgehog_joint", 64, 64, 64, True) | _NO_SCALE,
        _constants("elu", 64, 64, 64, True) | _PLAIN | _NO_SCALE,
        _constants("relu", 64, 64, 64, False) | _NO_DECAY | _NO_SCALE,
    ),
)
KERNELS = [STEP]


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    *rest: object,
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if q.dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16, not float64"
    if q.shape[-1] > 128 or state.shape[2] > MAX_FEATURES:
        return f"it holds inputs up to 128 wide and {MAX_FEATURES} features, not {q.shape[-1]} and {state.shape[2]}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    log_scale: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    query_weight, key_weight, log_decay = (
        None if x is None else x.contiguous() for x in (query_weight, key_weight, log_decay)
    )
    batch_size, heads, value_dim = v.shape
    width = q.shape[-1] if query_weight is None else query_weight.shape[-1]
    constants = _constants(feature_map, q.shape[-1], width, value_dim, normalize)
    absent = {"log_scale": None} if log_scale is None else {}
    tile = STEP.tile(device_properties(v.device.index), constants | absent, dtype_name(v.dtype))
    y = torch.empty_like(v)
    _step[(batch_size * heads,)](
        q, k, v, query_weight, key_weight, log_decay, state, log_scale, y, heads, q.shape[1], k.shape[1], epsilon,
        **constants, **tile.launch(),
    )  # fmt: skip
    return y
