"""The kernels of linear attention on a GPU: one for the outputs and all three large gradients.

With a chunk of Q tokens, inclusive in-chunk sums c of the log decays, and rows and columns of a
score tile standing for tokens, the forward is

    Y = [e^{c_i-c_j} ∘ (j<i) ∘ (Q K^T)] (past V)  +  diagonal (Q K^T ∘ (j=i)) V  +  e^{c_i} Q S
    S <- e^{c_Q} S + K^T (e^{c_Q-c_j} past V)

The gradients have the same form with the operands exchanged (dY the gradient of Y, S and dS as
carried from the front and from the back):

    dQ = scan(queries dY, keys V,  values K), front to back, state S^T
    dV = scan(queries K,  keys Q,  values dY), back to front, state dS
    dK = scan(queries V,  keys dY, values Q), back to front, state dS^T

so one kernel, ``_scan``, serves all of them. Nothing of size length x key x value is stored and
nothing of the forward is kept but y and the final state: each pass rebuilds its state on the way.

Tiling: a program walks one segment of one document for one head and one block of the value
width, with the state (key width x value block) in registers in float32. Rows of a tile are
(token, rank) pairs, in memory order, so that rank R needs no other code: M = Q R rows. When
documents x heads is too small to fill the GPU, a document is cut into segments: a pass without
outputs gives each segment's state from zero, ``_combine`` chains them, and the main pass starts
every segment from its own state.

Registers bind (255 a thread). With TMA no thread holds an address of a tile; head counts are
constants, so that the addresses that remain differ by constants; and the loop hoists nothing.
Weights of single tokens are kept to rows, of which a thread of a warpgroup's tile holds 2,
where a column takes 16.

The normaliser is a value column of ones: a running vector z beside S. In the gradients it is a
key lane of its own, carried the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Device, Tile, device_properties

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    source, batch_row, head, row, origin_row, column, row_ok,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS of one head, zero outside the tensor and, where ``row_ok`` is needed, outside the document.

    With TMA ``source`` is a descriptor over (batch, head, row, width): no thread holds an address, and what
    lies outside arrives as zero. Other machines load through pointers.
    """
    if TMA:
        tile = source.load([batch_row, head, row, column]).reshape(ROWS, COLUMNS)
        if MASKED:
            tile = tl.where(row_ok[:, None], tile, 0.0)
    else:
        columns = column + tl.arange(0, COLUMNS)
        ok = row_ok[:, None]
        if WIDTH % COLUMNS:
            ok = ok & (columns < WIDTH)[None, :]
        offsets = tl.arange(0, ROWS)[:, None] * (HEADS * WIDTH) + columns[None, :]
        tile = tl.load(source + (origin_row * HEADS + head) * WIDTH + offsets, mask=ok, other=0.0)
    return tile


@triton.jit(do_not_specialize=["length", "num_segments", "segment_length", "total_rows"])
def _scan(
    query, key, value, dot_with,
    output, log_decay, past, diagonal, lane, state_in, state_out, decay_out, dot_out, own_out, denominator,
    starts, lengths, length, num_segments, segment_length, total_rows,
    epsilon,
    HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr,
    DOT_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr, STATE_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, TF32X3: tl.constexpr,
):  # fmt: skip
    """One segment of one document, one head, one block of the value width.

    REVERSE walks from the back and reads row j, column i as "key j seen by query i". A pointer
    that is None switches its term off. ``lane`` is a score added to every pair (the normaliser's
    gradient): on the query's side, which is the row here and the column in reverse.
    """
    value_block = tl.program_id(0) % tl.cdiv(VALUE_DIM, BLOCK_V)
    rest = tl.program_id(0) // tl.cdiv(VALUE_DIM, BLOCK_V)
    head = rest % HEADS
    slot = rest // HEADS
    # Triton types an integer by its value; row numbers times widths need 64 bits.
    length = length.to(tl.int64)
    total_rows = total_rows.to(tl.int64)
    document = slot // num_segments.to(tl.int32)
    offset = (slot % num_segments.to(tl.int32)) * segment_length.to(tl.int64)
    if starts is not None:
        batch_row = 0
        first = tl.load(starts + document) + offset
        size = tl.load(lengths + document) - offset
        origin_of_row = 0
    else:
        batch_row = document
        first = offset
        size = length - offset
        origin_of_row = document * length
    size = tl.minimum(tl.maximum(size, 0), segment_length).to(tl.int32)

    TOKENS: tl.constexpr = BLOCK_M // RANK
    PRECISION: tl.constexpr = "tf32x3" if TF32X3 else "ieee"
    rows = tl.arange(0, BLOCK_M)
    token = rows // RANK
    keys = tl.arange(0, BLOCK_K)
    value_start = value_block * BLOCK_V
    values = value_start + tl.arange(0, BLOCK_V)
    # Exact blocks need no mask: said with constants, so that the compiler drops it.
    key_ok = (keys < KEY_DIM) if KEY_DIM % BLOCK_K else (keys >= 0)
    value_ok = (values < VALUE_DIM) if VALUE_DIM % BLOCK_V else (values >= 0)
    query_head = head * QUERY_HEADS // HEADS
    key_head = head * KEY_HEADS // HEADS
    value_head = head * VALUE_HEADS // HEADS
    dot_head = head * DOT_HEADS // HEADS

    # The state in memory is (key width, value width) of the forward, so a gradient whose keys are the
    # forward's values reads it transposed. The normaliser is its last column.
    STRIDE_K: tl.constexpr = 1 if TRANSPOSED else STATE_COLUMNS
    STRIDE_V: tl.constexpr = STATE_COLUMNS if TRANSPOSED else 1
    STATE_ROWS: tl.constexpr = VALUE_DIM if TRANSPOSED else KEY_DIM
    state_offset = (slot.to(tl.int64) * HEADS + head) * (STATE_ROWS * STATE_COLUMNS)
    tile_offset = keys[:, None] * STRIDE_K + values[None, :] * STRIDE_V
    tile_ok = key_ok[:, None] & value_ok[None, :]
    column_offset = keys * STRIDE_K + VALUE_DIM * STRIDE_V
    row_offset = KEY_DIM * STRIDE_K + values * STRIDE_V
    state = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    column = tl.zeros((BLOCK_K,), dtype=tl.float32)
    row = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if state_in is not None:
        state = tl.load(state_in + state_offset + tile_offset, mask=tile_ok, other=0.0).to(tl.float32)
        if NORMALIZE:
            column = tl.load(state_in + state_offset + column_offset, mask=key_ok, other=0.0).to(tl.float32)
        if lane is not None:
            row = tl.load(state_in + state_offset + row_offset, mask=value_ok, other=0.0).to(tl.float32)
    total_decay = 0.0

    num_chunks = tl.cdiv(size, TOKENS)
    # Without disable_licm every tile's addresses are computed once and held in registers for the whole loop.
    for step in tl.range(0, num_chunks, disable_licm=True):
        chunk = num_chunks - 1 - step if REVERSE else step
        local = first + chunk * TOKENS
        tile_row = (local * RANK).to(tl.int32)
        origin = origin_of_row + local
        origin_row = origin * RANK
        # Positions, not offsets inside the chunk, so that the masks made of them are not kept in registers.
        position = chunk * TOKENS + token
        row_ok = position < size
        if BLOCK_M % RANK:
            row_ok &= rows < TOKENS * RANK
        token_offset = token * HEADS + head
        row_offsets = rows * HEADS + head
        key_tile = _tile(
            key, batch_row, key_head, tile_row, origin_row, 0, row_ok, KEY_HEADS, KEY_DIM, BLOCK_M, BLOCK_K, TMA, MASKED
        )
        value_tile = _tile(
            value, batch_row, value_head, tile_row, origin_row, value_start, row_ok,
            VALUE_HEADS, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, MASKED,
        )  # fmt: skip
        if log_decay is not None:
            first_rank = row_ok & (rows % RANK == 0)
            step_decay = tl.load(log_decay + origin * HEADS + token_offset, mask=first_rank, other=0.0) * LOG2E
            inclusive = tl.cumsum(step_decay, 0)
            chunk_decay = tl.sum(step_decay, 0)
            # Factor of a row's view of the state before, and of a column's share of the state after.
            if REVERSE:
                row_factor = tl.exp2(chunk_decay - inclusive)
                column_factor = tl.exp2(inclusive)
            else:
                row_factor = tl.exp2(inclusive)
                column_factor = tl.exp2(chunk_decay - inclusive)
        else:
            row_factor = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
            column_factor = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
        # A token's weight for later ones goes into its value, so that no tile of weights needs it.
        past_tile = value_tile
        if past is not None:
            past_weight = tl.load(past + origin * HEADS + token_offset, mask=row_ok, other=0.0)
            if not REVERSE:
                past_tile = (value_tile.to(tl.float32) * past_weight[:, None]).to(value_tile.dtype)
        if lane is not None:
            lane_weight = tl.load(lane + origin_row * HEADS + row_offsets, mask=row_ok, other=0.0)

        if output is not None:
            query_tile = _tile(
                query, batch_row, query_head, tile_row, origin_row, 0, row_ok,
                QUERY_HEADS, KEY_DIM, BLOCK_M, BLOCK_K, TMA, MASKED,
            )  # fmt: skip
            result = tl.dot(query_tile, state.to(query_tile.dtype), input_precision=PRECISION)
            if lane is not None:
                if REVERSE:
                    result += row[None, :]
                else:
                    result += lane_weight[:, None] * row[None, :]
            result *= row_factor[:, None]
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            if lane is not None:
                if REVERSE:
                    scores += lane_weight[None, :]
                else:
                    scores += lane_weight[:, None]
            same = position[:, None] == position[None, :]
            before = position[:, None] < position[None, :] if REVERSE else position[:, None] > position[None, :]
            # The diagonal is apart where its weight is its own, or where the caller wants the part that decays.
            APART: tl.constexpr = (diagonal is not None) or (past is not None) or (dot_with is not None)
            if APART:
                own_scores = tl.where(same, scores, 0.0)
                if diagonal is not None:
                    own_weight = tl.load(diagonal + origin * HEADS + token_offset, mask=row_ok, other=0.0)
                else:
                    own_weight = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
            else:
                before = before | same
            if log_decay is not None:
                if REVERSE:
                    scores *= tl.exp2(tl.where(before, inclusive[None, :] - inclusive[:, None], float("-inf")))
                else:
                    scores *= tl.exp2(tl.where(before, inclusive[:, None] - inclusive[None, :], float("-inf")))
            else:
                scores = tl.where(before, scores, 0.0)
            if NORMALIZE:
                seen = tl.sum(query_tile.to(tl.float32) * column[None, :], 1)
                total = row_factor * seen + epsilon
                if past is not None:
                    total += tl.sum(scores * past_weight[None, :], 1)
                else:
                    total += tl.sum(scores, 1)
                if APART:
                    total += own_weight * tl.sum(own_scores, 1)
            result = tl.dot(scores.to(value_tile.dtype), past_tile, result, input_precision=PRECISION)
            if dot_with is not None:
                # Dot products with the operand that this is the gradient of: of the part that decays, which is
                # what the decays' gradient is made of, and below of the diagonal, for its weight's.
                other = _tile(
                    dot_with, batch_row, dot_head, tile_row, origin_row, value_start, row_ok,
                    DOT_HEADS, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, MASKED,
                )  # fmt: skip
                dot_offsets = (value_block * total_rows + origin_row) * HEADS + row_offsets
                tl.store(dot_out + dot_offsets, tl.sum(result * other.to(tl.float32), 1), mask=row_ok)
            if past is not None and REVERSE:
                result *= past_weight[:, None]
            if APART:
                own = tl.dot(own_scores.to(value_tile.dtype), value_tile, input_precision=PRECISION)
                if own_out is not None:
                    tl.store(own_out + dot_offsets, tl.sum(own * other.to(tl.float32), 1), mask=row_ok)
                result += own * own_weight[:, None]
            if NORMALIZE:
                result /= total[:, None]
                tl.store(denominator + origin_row * HEADS + row_offsets, total, mask=row_ok & (value_block == 0))
            output_offsets = rows[:, None] * (HEADS * VALUE_DIM) + values[None, :]
            tl.store(
                output + (origin_row * HEADS + head) * VALUE_DIM + output_offsets,
                result.to(output.dtype.element_ty), mask=row_ok[:, None] & value_ok[None, :],
            )  # fmt: skip

        if log_decay is not None:
            carry = tl.exp2(chunk_decay)
            total_decay += chunk_decay
            state *= carry
            column *= carry
            row *= carry
        weighted = past_tile.to(tl.float32) * column_factor[:, None]
        if NORMALIZE:
            key_factor = column_factor * past_weight if past is not None else column_factor
            column += tl.sum(key_tile.to(tl.float32) * key_factor[:, None], 0)
        if lane is not None:
            if REVERSE:
                row += tl.sum(weighted * lane_weight[:, None], 0)
            else:
                row += tl.sum(weighted, 0)
        state = tl.dot(tl.trans(key_tile), weighted.to(key_tile.dtype), state, input_precision=PRECISION)

    if state_out is not None:
        tl.store(state_out + state_offset + tile_offset, state, mask=tile_ok)
        if NORMALIZE:
            tl.store(state_out + state_offset + column_offset, column, mask=key_ok & (value_block == 0))
        if lane is not None:
            tl.store(state_out + state_offset + row_offset, row, mask=value_ok)
        if decay_out is not None:  # noqa: SIM102 (a constant beside a value known at run time)
            if value_block == 0:
                tl.store(decay_out + slot * HEADS + head, total_decay)


@triton.jit(do_not_specialize=["num_segments"])
def _combine(
    local, decay, initial, entering, final, num_segments, heads, state_size,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chains segment states: entering[s] = the state before segment s, final = after the last."""
    blocks = tl.cdiv(state_size, BLOCK)
    head = (tl.program_id(0) // blocks) % heads
    document = (tl.program_id(0) // blocks // heads).to(tl.int64)
    lanes = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = lanes < state_size
    running = tl.zeros((BLOCK,), dtype=tl.float32)
    if initial is not None:
        running = tl.load(initial + (document * heads + head) * state_size + lanes, mask=ok, other=0.0)
    for step in range(num_segments):
        part = num_segments - 1 - step if REVERSE else step
        slot = (document * num_segments + part) * heads + head
        tl.store(entering + slot * state_size + lanes, running, mask=ok)
        here = tl.load(local + slot * state_size + lanes, mask=ok, other=0.0)
        running = tl.exp2(tl.load(decay + slot)) * running + here
    tl.store(final + (document * heads + head) * state_size + lanes, running, mask=ok)


def _has_tma(device: Device) -> bool:
    """Bulk copies and warpgroup (or tensor-memory) products: Hopper and data-centre Blackwell."""
    return device.backend == "cuda" and 90 <= int(device.architecture) < 120


def _declared(**changes: Any) -> dict[str, Any]:
    """A pass for the audit: constants by name, and the tensors it does not get as None."""
    usual: dict[str, Any] = {
        "KEY_DIM": 128, "VALUE_DIM": 64, "RANK": 1, "STATE_COLUMNS": 64, "HEADS": 32, "QUERY_HEADS": 32,
        "KEY_HEADS": 32, "VALUE_HEADS": 32, "DOT_HEADS": 32, "REVERSE": False, "NORMALIZE": False,
        "TRANSPOSED": False, "MASKED": False,
    }  # fmt: skip
    absent = dict.fromkeys(("lane", *_DOTS, "denominator", "starts", "lengths", "decay_out"))
    for name in changes.pop("present", ()):
        del absent[name]
    constants = usual | {name: value for name, value in changes.items() if name in usual}
    constants["BLOCK_K"] = _block(constants["KEY_DIM"])
    return constants | absent | dict.fromkeys(changes.get("absent", ()))


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


_WEIGHTS = ("log_decay", "past", "diagonal")
_DOTS = ("dot_with", "dot_out", "own_out")
# dQ and dK of a forward with key width 128 and value width 64 have key width 64 and value width 128.
_EXCHANGED = {"KEY_DIM": 64, "VALUE_DIM": 128, "TRANSPOSED": True}
_VARIANTS = (
    _declared(),
    _declared(**_EXCHANGED, present=_DOTS),
    _declared(**_EXCHANGED, present=("dot_with", "dot_out"), REVERSE=True),
    _declared(REVERSE=True),
    _declared(RANK=4),
    _declared(RANK=4, **_EXCHANGED, present=("dot_with", "dot_out"), REVERSE=True),
    _declared(KEY_DIM=64, QUERY_HEADS=1, KEY_HEADS=1, absent=_WEIGHTS),
    _declared(STATE_COLUMNS=65, NORMALIZE=True, absent=_WEIGHTS, present=("denominator",)),
    _declared(STATE_COLUMNS=65, NORMALIZE=True, absent=("past", "diagonal"), present=("denominator",)),
    _declared(**_EXCHANGED, STATE_COLUMNS=65, absent=_WEIGHTS, present=("lane",)),
    _declared(**_EXCHANGED, STATE_COLUMNS=65, REVERSE=True, absent=_WEIGHTS, present=("lane",)),
    _declared(present=("starts", "lengths"), MASKED=True),
    _declared(**_EXCHANGED, present=("starts", "lengths", *_DOTS), MASKED=True),
    _declared(absent=("query", "output"), present=("decay_out",)),
    _declared(KEY_DIM=256, QUERY_HEADS=1, KEY_HEADS=1),
)
_POINTERS = {
    **dict.fromkeys(("query", "key", "value", "dot_with", "output"), "*{dtype}"),
    **dict.fromkeys(
        (*_WEIGHTS, "lane", "state_in", "state_out", "decay_out", "dot_out", "own_out", "denominator"), "*fp32"
    ),
    **dict.fromkeys(("starts", "lengths"), "*i64"),
    **dict.fromkeys(("length", "num_segments", "segment_length", "total_rows"), "i64"),
    "epsilon": "fp32",
}  # fmt: skip
_DESCRIPTORS = {
    **dict.fromkeys(("query", "key"), "tensordesc<{dtype}[1, 1, {BLOCK_M}, {BLOCK_K}]>"),
    **dict.fromkeys(("value", "dot_with"), "tensordesc<{dtype}[1, 1, {BLOCK_M}, {BLOCK_V}]>"),
}


def _tile_of(
    rows: int, columns: int, num_warps: int, num_stages: int, *, tma: bool = False, tf32x3: bool = True
) -> Tile:
    constants = {"BLOCK_M": rows, "BLOCK_V": columns, "TMA": int(tma), "TF32X3": int(tf32x3)}
    return Tile(constants, num_warps=num_warps, num_stages=num_stages)


def _up_to(width: int) -> tuple[dict[str, Any], ...]:
    return tuple(variant for variant in _VARIANTS if variant["BLOCK_K"] <= width)


# 64 rows feed a warpgroup; with more warps Triton would repeat the scores in each of them.
WIDE, NARROW, SHORT = (_tile_of(64, width, 4, stages, tma=True) for width, stages in ((64, 2), (32, 2), (32, 1)))


def _decayed_mean(variant: Mapping[str, Any]) -> bool:
    """A normaliser beside decays and 128 key lanes: only the shortest tile has registers for it."""
    return variant["NORMALIZE"] and variant["BLOCK_K"] > 64 and "log_decay" not in variant


def _fits(tile: Tile, variant: Mapping[str, Any], dtype: str) -> bool:
    """Masks of documents, or 256 key lanes, do not fit the registers beside 64 value columns."""
    if _decayed_mean(variant):
        return tile == SHORT
    if tile == WIDE:
        return variant["BLOCK_K"] <= 128 and not variant["MASKED"]
    return tile == NARROW or variant["MASKED"]


def _choose(device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
    """The widest that fits; where products go to tensor memory, a pipeline of masked tiles does not."""
    if _fits(WIDE, variant, dtype):
        return WIDE
    masked = variant["MASKED"] and int(device.architecture) >= 100
    return SHORT if masked or _decayed_mean(variant) else NARROW


SCAN = KernelSpec(
    name="linear_attention.scan",
    function=_scan,
    signature=_POINTERS | _DESCRIPTORS,
    tiles=(WIDE, NARROW, SHORT),
    variants=_VARIANTS,
    dtypes=("bf16", "fp16"),
    matrix_units=("bf16", "fp16"),
    devices=_has_tma,
    choose=_choose,
    valid=_fits,
)
# mma.sync takes its operands from registers, where a right-hand operand stands once in every warp: small tiles.
SMALL, SMALLER = _tile_of(32, 32, 4, 2), _tile_of(16, 32, 8, 1)
AMD, AMD_SMALL = _tile_of(64, 64, 4, 1, tf32x3=False), _tile_of(32, 32, 4, 1, tf32x3=False)


def _choose_small(device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
    wide = variant["BLOCK_K"] > 128
    if device.backend == "hip":
        return AMD_SMALL if wide else AMD
    return SMALLER if wide else SMALL


SCAN_SMALL = KernelSpec(
    name="linear_attention.scan_small",
    function=_scan,
    signature=_POINTERS,
    tiles=(SMALL, SMALLER, AMD, AMD_SMALL),
    variants=_VARIANTS,
    dtypes=("bf16", "fp16"),
    matrix_units=("bf16", "fp16"),
    devices=lambda device: not _has_tma(device),
    choose=_choose_small,
)
# Three TF32 products need four registers for what takes one in bfloat16, so key widths end sooner, and on
# the machines whose every product is an mma.sync sooner still. Warpgroups take no such operand transposed.
EXACT, EXACT_SMALL, EXACT_AMD = _tile_of(16, 32, 8, 1), _tile_of(16, 16, 4, 1), _tile_of(16, 32, 4, 1, tf32x3=False)
SCAN_FLOAT32 = KernelSpec(
    name="linear_attention.scan_float32",
    function=_scan,
    signature=_POINTERS,
    tiles=(EXACT,),
    variants=_up_to(128),
    dtypes=("fp32",),
    matrix_units=("fp32",),
    warpgroup=False,
    devices=_has_tma,
)
SCAN_FLOAT32_SMALL = KernelSpec(
    name="linear_attention.scan_float32_small",
    function=_scan,
    signature=_POINTERS,
    tiles=(EXACT_SMALL,),
    variants=_up_to(64),
    dtypes=("fp32",),
    matrix_units=("fp32",),
    devices=lambda device: device.backend == "cuda" and not _has_tma(device),
)
SCAN_FLOAT32_AMD = KernelSpec(
    name="linear_attention.scan_float32_amd",
    function=_scan,
    signature=_POINTERS,
    tiles=(EXACT_AMD,),
    variants=_up_to(128),
    dtypes=("fp32",),
    matrix_units=("fp32",),
    devices=lambda device: device.backend == "hip",
)
COMBINE = KernelSpec(
    name="linear_attention.combine",
    function=_combine,
    signature={
        **dict.fromkeys(("local", "decay", "initial", "entering", "final"), "*fp32"),
        "num_segments": "i64",
        "heads": "i32",
        "state_size": "i32",
    },
    tiles=(Tile({"BLOCK": 1024}, num_warps=4),),
    variants=({"REVERSE": False}, {"REVERSE": True}),
    dtypes=("fp32",),
)
_FLOAT32 = (SCAN_FLOAT32, SCAN_FLOAT32_SMALL, SCAN_FLOAT32_AMD)
KERNELS = [SCAN, SCAN_SMALL, *_FLOAT32, COMBINE]
MAX_RANK = 16


def _spec(device: Device, dtype: torch.dtype) -> KernelSpec:
    choices = _FLOAT32 if dtype == torch.float32 else (SCAN, SCAN_SMALL)
    return next(spec for spec in choices if spec.devices is not None and spec.devices(device))


def widest(device: Device, dtype: torch.dtype) -> int:
    """The largest key or value width (each is the key of one pass of the backward) that is audited."""
    return max(variant["BLOCK_K"] for variant in _spec(device, dtype).variants)


def _operand(x: Tensor, rows: int, columns: int, documents: bool) -> TensorDescriptor:
    """x (batch, length, ranks, heads, width) for TMA: (batch, head, token x rank, width), documents in one long row.

    Strides stay as they are where TMA can walk them (a part of a projection), so that nothing is copied.
    """
    batch_size, length, ranks, heads, width = x.shape
    batch_stride, token_stride, rank_stride, head_stride, _ = x.stride()
    step = 16 // x.element_size()
    walkable = (
        x.stride(4) == 1
        and x.data_ptr() % 16 == 0
        and not any(stride <= 0 or stride % step for stride in x.stride()[:4])
        and (ranks == 1 or token_stride == ranks * rank_stride)
        and (not documents or batch_size == 1 or batch_stride == length * token_stride)
    )
    if not walkable:
        x = F.pad(x, (0, -width % step)).contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        width = x.shape[-1]
        rank_stride, head_stride = heads * width, width
        token_stride = ranks * rank_stride
        batch_stride = length * token_stride
    row_stride = token_stride if ranks == 1 else rank_stride
    if documents:
        batch_size, length, batch_stride = 1, batch_size * length, batch_size * length * token_stride
    shape = [batch_size, heads, length * ranks, width]
    return TensorDescriptor(x, shape, [batch_stride, head_stride, row_stride, 1], [1, 1, rows, columns])


class Scanned(NamedTuple):
    """What a pass gives.

    Attributes:
        output: (batch, length, ranks, heads, value width).
        state: after the walk, or None.
        dots, owns: (batch, length, heads), dot products with ``dot_with`` of the part that decays and of
            the diagonal without its weight.
        denominators: (batch, length, ranks, heads).
    """

    output: Tensor
    state: Tensor | None
    dots: Tensor | None
    owns: Tensor | None
    denominators: Tensor | None


@dataclass
class Problem:
    """What every pass over one call's tokens shares."""

    batch_size: int
    length: int
    rank: int
    heads: int
    log_decay: Tensor | None
    past: Tensor | None
    diagonal: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    epsilon: float

    @property
    def documents(self) -> int:
        return self.batch_size if self.starts is None else self.starts.shape[0]

    def empty_rows(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """Output over all tokens; zero where documents may leave padding."""
        make = torch.empty if self.starts is None else torch.zeros
        return make(shape, dtype=dtype, device=like.device)

    def scan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: Tensor | None,
        *,
        transposed: bool = False,
        reverse: bool = False,
        normalize: bool = False,
        lane: Tensor | None = None,
        dot_with: Tensor | None = None,
        want_own: bool = False,
        want_state: bool = False,
        state_width: tuple[int, int],
    ) -> Scanned:
        """One pass; operands (batch, length, ranks, heads, width).

        The state is stored as (documents, H, *state_width) whichever way it is read:
        ``transposed`` reads its last dimension as the key's.
        """
        key_dim, value_dim = key.shape[-1], value.shape[-1]
        device = device_properties(value.device.index)
        spec = _spec(device, value.dtype)
        variant = {
            "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "RANK": self.rank, "STATE_COLUMNS": state_width[1],
            "HEADS": self.heads, "QUERY_HEADS": query.shape[-2], "KEY_HEADS": key.shape[-2],
            "VALUE_HEADS": value.shape[-2], "DOT_HEADS": 1 if dot_with is None else dot_with.shape[-2],
            "REVERSE": reverse, "NORMALIZE": normalize, "TRANSPOSED": transposed, "BLOCK_K": _block(key_dim),
            "MASKED": self.starts is not None or self.rank & (self.rank - 1) != 0,
        }  # fmt: skip
        absent = {"log_decay": None} if self.log_decay is None else {}
        tile = spec.tile(device, variant | absent, dtype_name(value.dtype))
        block_m, block_v = tile.constants["BLOCK_M"], tile.constants["BLOCK_V"]
        tokens = block_m // self.rank
        value_blocks = triton.cdiv(value_dim, block_v)
        programs = value_blocks * self.heads * self.documents
        # Two programs a multiprocessor; a segment of less than four tiles is not worth its state.
        wanted = min(2 * device.multiprocessors // programs, triton.cdiv(self.length, 4 * tokens))
        segment_length = triton.cdiv(triton.cdiv(self.length, max(wanted, 1)), tokens) * tokens
        segments = triton.cdiv(self.length, segment_length)

        shape = (self.batch_size, self.length, self.rank, self.heads)
        output = self.empty_rows(value, value.dtype, *shape, value_dim)
        dots = None if dot_with is None else self.empty_rows(value, torch.float32, value_blocks, *shape)
        owns = self.empty_rows(value, torch.float32, value_blocks, *shape) if want_own else None
        denominators = self.empty_rows(value, torch.float32, *shape) if normalize else None
        state_size = state_width[0] * state_width[1]
        final = None
        if want_state:
            final = value.new_empty((self.documents, self.heads, *state_width), dtype=torch.float32)
        operands: list[Any] = [query, key, value, dot_with]
        if tile.constants["TMA"]:
            columns = (variant["BLOCK_K"], variant["BLOCK_K"], block_v, block_v)
            operands = [
                None if x is None else _operand(x, block_m, width, self.starts is not None)
                for x, width in zip(operands, columns, strict=True)
            ]
        else:
            operands = [None if x is None else x.contiguous() for x in operands]
        query, key, value, dot_with = operands
        rows = self.batch_size * self.length * self.rank

        def launch(state_in: Tensor | None, state_out: Tensor | None, decay_out: Tensor | None, outputs: bool) -> None:
            optional = (dot_with, output), (dots, owns, denominators)
            (with_, out), rest = optional if outputs else ((None, None), (None, None, None))
            _scan[(programs * segments,)](
                query if outputs else None, key, value, with_,
                out, self.log_decay, self.past, self.diagonal, lane, state_in, state_out, decay_out, *rest,
                self.starts, self.lengths, self.length, segments, segment_length, rows, self.epsilon,
                **variant, **tile.launch(),
            )  # fmt: skip

        if segments > 1:
            local = torch.empty(
                (self.documents * segments, self.heads, *state_width), dtype=torch.float32, device=output.device
            )
            decay = local.new_zeros((self.documents * segments, self.heads))
            launch(None, local, decay, outputs=False)
            entering = torch.empty_like(local)
            after = final if final is not None else torch.empty_like(local[: self.documents])
            block = COMBINE.tiles[0].constants["BLOCK"]
            _combine[(self.documents * self.heads * triton.cdiv(state_size, block),)](
                local, decay, state, entering, after, segments, self.heads, state_size,
                REVERSE=reverse, **COMBINE.tiles[0].launch(),
            )  # fmt: skip
            launch(entering, None, None, outputs=True)
        else:
            launch(state, final, None, outputs=True)
        dots, owns = (None if x is None else x.sum((0, 3)) for x in (dots, owns))
        return Scanned(output, final, dots, owns, denominators)
