"""One decode step of linear attention on a GPU.

    y_r = q_r e^g S + diagonal sum_rho (q_r . k_rho) v_rho,    S <- e^g S + past sum_rho k_rho v_rho^T

The state is nearly all of the traffic, so it is read once and written once, in runs of 16 bytes: a
program owns BLOCK_V value columns of one head of one sequence with all their keys. The normaliser is
the state's last column, which every output of the head needs before it changes: with it one program
walks all blocks of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _step(
    query, key, value, log_decay, past, diagonal, state, output, heads, query_heads, key_heads, epsilon,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    COLUMNS: tl.constexpr = VALUE_DIM + 1 if NORMALIZE else VALUE_DIM
    slot = (tl.program_id(0) if NORMALIZE else tl.program_id(0) // BLOCKS).to(tl.int64)
    row = slot // heads
    head = slot % heads
    decay = tl.exp(tl.load(log_decay + slot)) if log_decay is not None else 1.0
    past_weight = tl.load(past + slot) if past is not None else 1.0
    own_weight = tl.load(diagonal + slot) if diagonal is not None else 1.0

    keys = tl.arange(0, BLOCK_K)
    key_ok = keys < KEY_DIM
    query += (row * RANK * query_heads + head * query_heads // heads) * KEY_DIM + keys
    key += (row * RANK * key_heads + head * key_heads // heads) * KEY_DIM + keys
    value += (row * RANK * heads + head) * VALUE_DIM
    output += (row * RANK * heads + head) * VALUE_DIM
    state += slot * (KEY_DIM * COLUMNS)

    if NORMALIZE:
        column_at = state + keys * COLUMNS + VALUE_DIM
        column = tl.load(column_at, mask=key_ok, other=0.0) * decay
    for step in tl.static_range(0, BLOCKS if NORMALIZE else 1):
        block = step if NORMALIZE else tl.program_id(0) % BLOCKS
        values = block * BLOCK_V + tl.arange(0, BLOCK_V)
        value_ok = values < VALUE_DIM
        tile_at = state + keys[:, None] * COLUMNS + values[None, :]
        tile_ok = key_ok[:, None] & value_ok[None, :]
        old = tl.load(tile_at, mask=tile_ok, other=0.0) * decay
        new = old
        for rank in tl.static_range(RANK):
            q = tl.load(query + rank * query_heads * KEY_DIM, mask=key_ok, other=0.0).to(tl.float32)
            y = tl.sum(q[:, None] * old, 0)
            total = epsilon
            if NORMALIZE:
                total += tl.sum(q * column, 0)
            for other in tl.static_range(RANK):
                k = tl.load(key + other * key_heads * KEY_DIM, mask=key_ok, other=0.0).to(tl.float32)
                v = tl.load(value + other * heads * VALUE_DIM + values, mask=value_ok, other=0.0).to(tl.float32)
                own = own_weight * tl.sum(q * k, 0)
                y += own * v
                total += own
                if rank == 0:
                    new += k[:, None] * (past_weight * v)[None, :]
            if NORMALIZE:
                y /= total
            tl.store(output + rank * heads * VALUE_DIM + values, y, mask=value_ok)
        # A thread may hold a copy of what another one writes: all have read before any writes.
        tl.debug_barrier()
        tl.store(tile_at, new, mask=tile_ok)
    if NORMALIZE:
        for rank in tl.static_range(RANK):
            column += past_weight * tl.load(key + rank * key_heads * KEY_DIM, mask=key_ok, other=0.0).to(tl.float32)
        tl.store(column_at, column, mask=key_ok)


def _constants(key_dim: int, value_dim: int, rank: int, normalize: bool) -> dict[str, Any]:
    return {
        "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "RANK": rank, "NORMALIZE": normalize,
        "BLOCK_K": max(16, triton.next_power_of_2(key_dim)),
    }  # fmt: skip


_UNWEIGHTED = dict.fromkeys(("log_decay", "past", "diagonal"))
STEP = KernelSpec(
    name="linear_attention.step",
    function=_step,
    signature={
        **dict.fromkeys(("query", "key", "value", "output"), "*{dtype}"),
        **dict.fromkeys(("log_decay", "past", "diagonal", "state"), "*fp32"),
        **dict.fromkeys(("heads", "query_heads", "key_heads"), "i32"),
        "epsilon": "fp32",
    },
    tiles=(Tile({"BLOCK_V": 32}, num_warps=4, num_stages=1),),
    variants=(
        _constants(128, 64, 1, False),
        _constants(64, 64, 1, False) | _UNWEIGHTED,
        _constants(64, 64, 1, True) | _UNWEIGHTED,
        _constants(128, 64, 4, False),
        _constants(256, 128, 1, False),
    ),
)
KERNELS = [STEP]


def supports(q: Tensor, *rest: object) -> str | None:
    if q.dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16, not float64"
    return None if q.shape[-1] <= 256 else f"it holds key widths up to 256, not {q.shape[-1]}"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    state: Tensor,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    weights = (None if x is None else x.contiguous() for x in (log_decay, past_weight, diagonal_weight))
    batch_size, ranks, heads, value_dim = v.shape
    constants = _constants(q.shape[-1], value_dim, ranks, normalize)
    tile = STEP.tile(device_properties(v.device.index), constants, dtype_name(v.dtype))
    y = torch.empty_like(v)
    blocks = 1 if normalize else triton.cdiv(value_dim, tile.constants["BLOCK_V"])
    _step[(batch_size * heads * blocks,)](
        q, k, v, *weights, state, y, heads, q.shape[2], k.shape[2], epsilon, **constants, **tile.launch()
    )
    return y
