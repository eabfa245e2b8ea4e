"""The gradients' kernels of sparse global attention; the keys' tables and tiles are as in ``triton_forward``.

With P = e^{scores - log_sum}, dP = dY V^T, delta_i = dy_i . y_i and dS = P ∘ (dP - delta):

    dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dY,   d bias_j = sum_i dS_ij

Every sum has a fixed order, and no two programs write one number:

* queries: a program walks the keys of its rows, as in the forward, and leaves delta for the others.
* local keys: a program owns a tile of keys of one block and walks the queries that see them, which
  stand side by side in the table of tokens, this block's and the following ones'.
* chosen keys: a program owns a tile of one block's chosen keys and walks that block's queries. A key may be
  chosen by every later block, so these are parts, which ``_collect`` adds key by key, in order of the blocks.

Without disable_licm the tiles that a loop reuses are held in registers in every form that its products take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.sparse_attention.triton_forward import (
    LOG2E,
    NOBODY,
    TABLES,
    far_keys,
    far_range,
    load_rows,
    near_keys,
    near_range,
    query_rows,
    store_rows,
)
from seqmodels.ops.sparse_attention.triton_tiles import SHAPES, declare
from seqmodels.ops.tiles import Tile


@triton.jit
def _grad_query(
    query, grad, log_sum, delta, keys, values, source, bias, seen, head, scale, total,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows' gradient without its scale, after one more tile of keys."""
    place = source * HEADS + head
    key = load_rows(keys, place, source >= 0, WIDTH, BLOCK_P)
    value = load_rows(values, place, source >= 0, WIDTH, BLOCK_P)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if bias is not None:
        scores += bias[None, :]
    probability = tl.exp2(tl.where(seen, scores - log_sum[:, None], float("-inf")))
    change = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
    return total + tl.dot((probability * change).to(key.dtype), key, input_precision=PRECISION)


@triton.jit(do_not_specialize=["size", "window", "num_globals"])
def _query_gradient(
    query, keys, values, bias, token, position, local_source, global_source, global_position,
    grad, output, log_sum, delta, grad_query, size, window, num_globals, scale,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TF32X3: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one block, one key head; writes delta too."""
    PRECISION: tl.constexpr = "tf32x3" if TF32X3 else "ieee"
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) % HEADS
    start = tl.program_id(1) // HEADS * BLOCK_M
    slot, there, place = query_rows(token, block, size, start, size, head, HEADS, REPEAT, BLOCK_M)
    last = tl.max(tl.where(there, slot, -1), 0)
    if last < 0:
        return
    query_tile = load_rows(query, place, there, WIDTH, BLOCK_P)
    grad_tile = load_rows(grad, place, there, WIDTH, BLOCK_P)
    output_tile = load_rows(output, place, there, WIDTH, BLOCK_P)
    inner = tl.sum(grad_tile.to(tl.float32) * output_tile.to(tl.float32), 1)
    tl.store(delta + place, inner, mask=there)
    offset_of_row = tl.load(log_sum + place, mask=there, other=0.0) * LOG2E
    origin = tl.load(position + block * size).to(tl.int32)

    total = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    begin, end = near_range(start // REPEAT, last, origin, window)
    for offset in tl.range(begin, end, BLOCK_N, disable_licm=True):
        offsets = offset + tl.arange(0, BLOCK_N)
        source = near_keys(local_source, block, offsets, size + window - 1)
        seen = (slot[:, None] <= offsets[None, :]) & (offsets[None, :] < slot[:, None] + window)
        total = _grad_query(
            query_tile, grad_tile, offset_of_row, inner, keys, values, source, None, seen, head, scale * LOG2E, total,
            HEADS, WIDTH, BLOCK_P, PRECISION,
        )  # fmt: skip
    for offset in tl.range(0, far_range(last, origin, num_globals, window), BLOCK_N, disable_licm=True):
        places = offset + tl.arange(0, BLOCK_N)
        source, first, weight = far_keys(
            global_source, global_position, bias, block, places, num_globals, origin, window
        )
        total = _grad_query(
            query_tile, grad_tile, offset_of_row, inner, keys, values, source, weight, first[None, :] <= slot[:, None],
            head, scale * LOG2E, total, HEADS, WIDTH, BLOCK_P, PRECISION,
        )  # fmt: skip
    store_rows(grad_query, place, there, total * scale, WIDTH, BLOCK_P)


@triton.jit
def _span(local_source, block, blocks, size, window):
    """How many blocks from this one on belong to its document, no more than see its keys."""
    reach = size + window - 1
    found = 1
    for ahead in tl.range(1, (size + window - 2) // size + 1):
        # The key in front of the next block's first slot is the last of this one, if they are of one document.
        inside = block + ahead < blocks
        there = tl.load(local_source + (block + ahead) * reach + window - 2, mask=inside, other=-1)
        here = tl.load(local_source + (block + ahead - 1) * reach + window - 2 + size, mask=inside, other=-1)
        found += ((found == ahead) & (there == here) & (here >= 0)).to(tl.int32)
    return found


@triton.jit(do_not_specialize=["blocks", "size", "window", "num_keys", "first_key", "first_head", "num_heads"])
def _key_gradient(
    query, keys, values, bias, token, position, sources, global_position, grad, log_sum, delta,
    grad_keys, grad_values, grad_bias, blocks, size, window, num_keys, first_key, first_head, num_heads, scale,
    FAR: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TF32X3: tl.constexpr,
):  # fmt: skip
    """One tile of one block's local keys (whole sums, to their rows of the universe) or, where FAR, of its chosen
    keys (this block's part, to (block, key, ``num_heads`` heads from ``first_head`` on))."""
    PRECISION: tl.constexpr = "tf32x3" if TF32X3 else "ieee"
    block = tl.program_id(0).to(tl.int64)
    head_of_chunk = tl.program_id(1) % num_heads
    head = first_head + head_of_chunk
    offsets = first_key + tl.program_id(1) // num_heads * BLOCK_N + tl.arange(0, BLOCK_N)
    if FAR:
        origin = tl.load(position + block * size).to(tl.int32)
        source, first, weight = far_keys(sources, global_position, bias, block, offsets, num_keys, origin, window)
        begin, end = tl.min(first, 0), size
    else:
        source = near_keys(sources, block, offsets, num_keys)
        # A key that an earlier block of the document lists is that block's.
        owned = tl.load(
            sources + (block - 1) * num_keys + offsets + size, mask=(block > 0) & (offsets + size < num_keys), other=-1
        )
        source = tl.where(owned == source, -1, source)
        begin = tl.min(tl.where(source >= 0, offsets - window + 1, NOBODY), 0)
        end = tl.minimum(
            tl.max(tl.where(source >= 0, offsets, -1), 0) + 1, _span(sources, block, blocks, size, window) * size
        )
    there = source >= 0
    if tl.max(source, 0) < 0:
        return
    begin = tl.minimum(tl.maximum(begin, 0), end)
    place = source * HEADS + head
    key = load_rows(keys, place, there, WIDTH, BLOCK_P)
    value = load_rows(values, place, there, WIDTH, BLOCK_P)
    total_key = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    total_value = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    if FAR:
        total_bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row in tl.range(begin * REPEAT, end * REPEAT, BLOCK_M, disable_licm=True):
        # What is not a token has zeros for query and gradient, and gives nothing.
        slot, token_there, lane = query_rows(token, block, size, row, end, head, HEADS, REPEAT, BLOCK_M)
        query_tile = load_rows(query, lane, token_there, WIDTH, BLOCK_P)
        grad_tile = load_rows(grad, lane, token_there, WIDTH, BLOCK_P)
        offset_of_row = tl.load(log_sum + lane, mask=token_there, other=0.0) * LOG2E
        inner = tl.load(delta + lane, mask=token_there, other=0.0)
        scores = tl.dot(key, tl.trans(query_tile), input_precision=PRECISION) * (scale * LOG2E)
        if FAR:
            scores += weight[:, None]
            seen = first[:, None] <= slot[None, :]
        else:
            seen = (slot[None, :] <= offsets[:, None]) & (offsets[:, None] < slot[None, :] + window)
        probability = tl.exp2(tl.where(seen, scores - offset_of_row[None, :], float("-inf")))
        total_value += tl.dot(probability.to(grad_tile.dtype), grad_tile, input_precision=PRECISION)
        change = tl.dot(value, tl.trans(grad_tile), input_precision=PRECISION) - inner[None, :]
        change *= probability
        if FAR:
            total_bias += tl.sum(change, 1)
        total_key += tl.dot(change.to(query_tile.dtype), query_tile, input_precision=PRECISION)
    if FAR:
        part = block * num_keys + offsets
        tl.store(grad_bias + part * HEADS + head, total_bias, mask=there)
        target = part * num_heads + head_of_chunk
    else:
        target = place
    store_rows(grad_keys, target, there, total_key * scale, WIDTH, BLOCK_P)
    store_rows(grad_values, target, there, total_value, WIDTH, BLOCK_P)


@triton.jit(do_not_specialize=["width", "stride", "first_column"])
def _collect(
    parts, target, order, bounds, width, stride, first_column, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """target[row, first_column + c] += sum of parts[order[e], c] over bounds[row] <= e < bounds[row + 1]."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + row), tl.load(bounds + row + 1)
    if begin < end:  # most rows were never chosen
        columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = columns < width
        at = target + row * stride + first_column + columns
        total = tl.load(at, mask=inside, other=0.0)
        for entry in tl.range(begin, end, BLOCK_E):
            entries = entry + tl.arange(0, BLOCK_E)
            part = tl.load(order + entries, mask=entries < end, other=0)
            ok = (entries < end)[:, None] & inside[None, :]
            total += tl.sum(tl.load(parts + part[:, None] * width + columns[None, :], mask=ok, other=0.0), 0)
        tl.store(at, total, mask=inside)


_TENSORS = dict.fromkeys(("query", "keys", "values", "grad"), "*{dtype}")
_SUMS = dict.fromkeys(("log_sum", "delta"), "*fp32")
QUERY_GRADIENT = declare(
    "query_gradient",
    _query_gradient,
    {**TABLES, **_TENSORS, **_SUMS, "output": "*{dtype}", "grad_query": "*{dtype}"},
    SHAPES,
    walks="keys",
)
_NEAR = dict.fromkeys(("bias", "position", "global_position", "grad_bias"))  # what local keys do without
KEY_GRADIENT = declare(
    "key_gradient",
    _key_gradient,
    {
        **_TENSORS,
        **_SUMS,
        **dict.fromkeys(("token", "position", "sources", "global_position"), "*i64"),
        **dict.fromkeys(("bias", "grad_keys", "grad_values", "grad_bias"), "*fp32"),
        **dict.fromkeys(("blocks", "size", "window", "num_keys", "first_key", "first_head", "num_heads"), "i32"),
        "scale": "fp32",
    },
    tuple({**shape, "FAR": far, **({} if far else _NEAR)} for shape in SHAPES for far in (True, False)),
    walks="queries",
)
COLLECT = KernelSpec(
    name="sparse_attention.collect",
    function=_collect,
    signature={
        **dict.fromkeys(("parts", "target"), "*fp32"),
        **dict.fromkeys(("order", "bounds"), "*i64"),
        **dict.fromkeys(("width", "stride", "first_column"), "i32"),
    },
    tiles=(Tile({"BLOCK_E": 8, "BLOCK_W": 256}, num_warps=4),),
    dtypes=("fp32",),
)
KERNELS = [*QUERY_GRADIENT, *KEY_GRADIENT, COLLECT]
