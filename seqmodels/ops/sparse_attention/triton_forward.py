"""The forward kernel of sparse global attention, and what it shares with the gradients' kernels.

    y_i = sum_j softmax_j(scale q_i . k_j + bias_j) v_j     over the keys j that query i sees

Keys are never gathered in memory: a tile of a block's list of keys is loaded row by row through the
table that names their rows, first the local keys, then the chosen ones. Which query of the block sees
a key is an interval of its slots: with the local keys in order of position from the first query's
window on, slot i sees offsets i <= o < i + window; slot i sees the chosen key at position p from
i = p + window - (position of slot 0) on, before which its own window has it.

Tiling: a program has a tile of rows of one block for one key head. A row is a (slot, query head of the group)
pair, in memory order, so that the heads of a group share every load of keys and values, and the softmax
runs along the list with a maximum and a sum for each row in float32, in powers of two.

Bytes: each block reads its S + w - 1 + G keys and values once for each tile of rows, from the L2 cache as
a rule (the next block reads nearly the same ones); q and y pass once. The tables are 8 bytes a key of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqmodels.ops.sparse_attention.triton_tiles import SHAPES, declare

LOG2E = tl.constexpr(1.4426950408889634)
NOBODY = tl.constexpr(1 << 30)  # the first slot that sees a key that is not there
LOWEST = tl.constexpr(-1e30)  # finite, so that a row that has seen nothing yet subtracts no infinities


@triton.jit
def near_keys(local_source, block, offsets, reach):
    """Rows of the universe of local keys. Which slots see them follows from the offsets alone."""
    return tl.load(local_source + block * reach + offsets, mask=offsets < reach, other=-1).to(tl.int32)


@triton.jit
def far_keys(global_source, global_position, bias, block, places, num_globals, origin, window):
    """(row of the universe, first slot that sees it, bias in powers of two) of chosen keys."""
    there = places < num_globals
    at = block * num_globals + places
    source = tl.load(global_source + at, mask=there, other=-1).to(tl.int32)
    position = tl.load(global_position + at, mask=there, other=0).to(tl.int32)
    first = tl.where(source >= 0, position + (window - origin), NOBODY)
    return source, first, tl.load(bias + source, mask=source >= 0, other=0.0) * LOG2E


@triton.jit
def query_rows(token, block, size, start, stop, head, HEADS: tl.constexpr, REPEAT: tl.constexpr, ROWS: tl.constexpr):
    """(slot, whether a token is there, place among all tokens' query heads) of rows from ``start`` on, slots below
    ``stop``. Slots of later blocks follow those of this one."""
    rows = start + tl.arange(0, ROWS)
    slot = rows // REPEAT
    found = tl.load(token + block * size + slot, mask=slot < stop, other=-1)
    return slot, found >= 0, (found.to(tl.int32) * HEADS + head) * REPEAT + rows % REPEAT


@triton.jit
def load_rows(source, place, there, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows ``place`` of a (rows, WIDTH) matrix, zero where they are not ``there``."""
    columns = tl.arange(0, BLOCK_P)
    ok = there[:, None]
    if WIDTH % BLOCK_P:
        ok = ok & (columns < WIDTH)[None, :]
    return tl.load(source + place[:, None].to(tl.int64) * WIDTH + columns[None, :], mask=ok, other=0.0)


@triton.jit
def store_rows(target, place, there, tile, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr):
    columns = tl.arange(0, BLOCK_P)
    ok = there[:, None]
    if WIDTH % BLOCK_P:
        ok = ok & (columns < WIDTH)[None, :]
    tl.store(target + place[:, None].to(tl.int64) * WIDTH + columns[None, :], tile.to(target.dtype.element_ty), mask=ok)


@triton.jit
def near_range(first, last, origin, window):
    """Offsets (begin, end) of the local keys that slots ``first`` to ``last`` see."""
    # Offsets below the second are in front of the document.
    return tl.maximum(first, window - 1 - origin), last + window


@triton.jit
def far_range(last, origin, num_globals, window):
    """The end of the chosen keys that slots up to ``last`` may see: no more than there were tokens to choose from."""
    return tl.where(origin + last >= window, tl.minimum(origin, num_globals), 0)


@triton.jit
def _fold(
    query, keys, values, source, bias, seen, head, scale, top, total, mean,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running (maximum, sum, sum of values) of each row after one more tile of keys."""
    place = source * HEADS + head
    key = load_rows(keys, place, source >= 0, WIDTH, BLOCK_P)
    value = load_rows(values, place, source >= 0, WIDTH, BLOCK_P)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if bias is not None:
        scores += bias[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    risen = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - risen[:, None])
    kept = tl.exp2(top - risen)
    mean = mean * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return risen, total * kept + tl.sum(weights, 1), mean


@triton.jit(do_not_specialize=["size", "window", "num_globals"])
def _forward(
    query, keys, values, bias, token, position, local_source, global_source, global_position,
    output, log_sum, size, window, num_globals, scale,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TF32X3: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one block, one key head."""
    PRECISION: tl.constexpr = "tf32x3" if TF32X3 else "ieee"
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) % HEADS
    start = tl.program_id(1) // HEADS * BLOCK_M
    slot, there, place = query_rows(token, block, size, start, size, head, HEADS, REPEAT, BLOCK_M)
    last = tl.max(tl.where(there, slot, -1), 0)
    if last < 0:
        return
    query_tile = load_rows(query, place, there, WIDTH, BLOCK_P)
    origin = tl.load(position + block * size).to(tl.int32)

    top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    begin, end = near_range(start // REPEAT, last, origin, window)
    for offset in tl.range(begin, end, BLOCK_N):
        offsets = offset + tl.arange(0, BLOCK_N)
        source = near_keys(local_source, block, offsets, size + window - 1)
        seen = (slot[:, None] <= offsets[None, :]) & (offsets[None, :] < slot[:, None] + window)
        top, total, mean = _fold(
            query_tile, keys, values, source, None, seen, head, scale, top, total, mean,
            HEADS, WIDTH, BLOCK_P, PRECISION,
        )  # fmt: skip
    for offset in tl.range(0, far_range(last, origin, num_globals, window), BLOCK_N):
        places = offset + tl.arange(0, BLOCK_N)
        source, first, weight = far_keys(
            global_source, global_position, bias, block, places, num_globals, origin, window
        )
        top, total, mean = _fold(
            query_tile, keys, values, source, weight, first[None, :] <= slot[:, None], head, scale, top, total, mean,
            HEADS, WIDTH, BLOCK_P, PRECISION,
        )  # fmt: skip
    # A token sees itself; what is not a token is not stored.
    total = tl.where(there, total, 1.0)
    store_rows(output, place, there, mean / total[:, None], WIDTH, BLOCK_P)
    tl.store(log_sum + place, (top + tl.log2(total)) / LOG2E, mask=there)


TABLES = {
    **dict.fromkeys(("token", "position", "local_source", "global_source", "global_position"), "*i64"),
    **dict.fromkeys(("size", "window", "num_globals"), "i32"),
    "bias": "*fp32",
    "scale": "fp32",
}
FORWARD = declare(
    "forward",
    _forward,
    {**TABLES, **dict.fromkeys(("query", "keys", "values", "output"), "*{dtype}"), "log_sum": "*fp32"},
    SHAPES,
    walks="keys",
)
KERNELS = [*FORWARD]
