"""Linear attention on a GPU: one Triton kernel for the outputs and all three large gradients.

With a chunk of Q tokens, inclusive in-chunk sums c of the log decays, and rows and columns of a
score tile standing for tokens, the forward is

    Y = [past ∘ e^{c_i-c_j} ∘ (j<i)  +  diagonal ∘ (j=i)] ∘ (Q K^T) V  +  e^{c_i} Q S
    S <- e^{c_Q} S + (e^{c_Q-c_j} past_j K)^T V

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

The normaliser is a value column of ones: a running vector z beside S. In the gradients it is a
key lane of its own, carried the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.documents import token_table
from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Device, Tile, device_properties

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["length", "num_segments", "segment_length"])
def _scan(
    query, key, value, output, log_decay, past, diagonal, lane,
    state_in, state_out, decay_out, dot_with, dot_out, denominator,
    starts, lengths, length, num_segments, segment_length, total_rows,
    heads, query_heads, key_heads, value_heads, dot_heads,
    epsilon,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr, STATE_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one document, one head, one block of the value width.

    REVERSE walks from the back and reads row j, column i as "key j seen by query i". A pointer
    that is None switches its term off. ``lane`` is a score added to every pair (the normaliser's
    gradient): on the query's side, which is the row here and the column in reverse.
    """
    value_block = tl.program_id(0) % tl.cdiv(VALUE_DIM, BLOCK_V)
    rest = tl.program_id(0) // tl.cdiv(VALUE_DIM, BLOCK_V)
    head = rest % heads
    slot = (rest // heads).to(tl.int64)
    document = slot // num_segments
    offset = (slot % num_segments) * segment_length
    if starts is not None:
        first = tl.load(starts + document) + offset
        size = tl.load(lengths + document) - offset
    else:
        first = document * length + offset
        size = length - offset
    size = tl.minimum(tl.maximum(size, 0), segment_length).to(tl.int32)

    TOKENS: tl.constexpr = BLOCK_M // RANK
    rows = tl.arange(0, BLOCK_M)
    token = rows // RANK
    keys = tl.arange(0, BLOCK_K)
    values = value_block * BLOCK_V + tl.arange(0, BLOCK_V)
    # Exact blocks need no mask: said with constants, so that the compiler drops it.
    key_ok = (keys < KEY_DIM) if KEY_DIM % BLOCK_K else (keys >= 0)
    value_ok = (values < VALUE_DIM) if VALUE_DIM % BLOCK_V else (values >= 0)

    query += head * query_heads // heads * KEY_DIM
    key += head * key_heads // heads * KEY_DIM
    value += head * value_heads // heads * VALUE_DIM

    # The state in memory is (key width, value width) of the forward, so a gradient whose keys are the
    # forward's values reads it transposed. The normaliser is its last column.
    STRIDE_K: tl.constexpr = 1 if TRANSPOSED else STATE_COLUMNS
    STRIDE_V: tl.constexpr = STATE_COLUMNS if TRANSPOSED else 1
    STATE_ROWS: tl.constexpr = VALUE_DIM if TRANSPOSED else KEY_DIM
    state_offset = (slot * heads + head) * (STATE_ROWS * STATE_COLUMNS)
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
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        # 64-bit for the chunk, 32-bit inside it.
        origin = first + (chunk * TOKENS).to(tl.int64)
        origin_row = origin * RANK
        # Positions, not offsets inside the chunk, so that the masks made of them are not kept in registers.
        position = chunk * TOKENS + token
        row_ok = position < size
        if BLOCK_M % RANK:
            row_ok &= rows < TOKENS * RANK
        token_offset = token * heads + head
        row_offsets = rows * heads + head
        key_tile = tl.load(
            key + origin_row * key_heads * KEY_DIM + (rows[:, None] * (key_heads * KEY_DIM) + keys[None, :]),
            mask=row_ok[:, None] & key_ok[None, :], other=0.0,
        )  # fmt: skip
        value_tile = tl.load(
            value + origin_row * value_heads * VALUE_DIM + (rows[:, None] * (value_heads * VALUE_DIM) + values[None, :]),
            mask=row_ok[:, None] & value_ok[None, :], other=0.0,
        )  # fmt: skip
        if log_decay is not None:
            step_decay = tl.load(log_decay + origin * heads + token_offset, mask=row_ok & (rows % RANK == 0), other=0.0) * LOG2E
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
        if past is not None:
            past_weight = tl.load(past + origin * heads + token_offset, mask=row_ok, other=0.0)
            if not REVERSE:
                column_factor *= past_weight
        if lane is not None:
            lane_weight = tl.load(lane + origin_row * heads + row_offsets, mask=row_ok, other=0.0)

        if output is not None:
            query_tile = tl.load(
                query + origin_row * query_heads * KEY_DIM + (rows[:, None] * (query_heads * KEY_DIM) + keys[None, :]),
                mask=row_ok[:, None] & key_ok[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            if lane is not None:
                if REVERSE:
                    scores += lane_weight[None, :]
                else:
                    scores += lane_weight[:, None]
            same = position[:, None] == position[None, :]
            if REVERSE:
                before = position[:, None] < position[None, :]
            else:
                before = position[:, None] > position[None, :]
            if diagonal is not None:
                own_weight = tl.load(diagonal + origin * heads + token_offset, mask=row_ok, other=0.0)
            else:
                own_weight = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
            if dot_with is not None:
                own_scores = tl.where(same, scores * own_weight[:, None], 0.0).to(value_tile.dtype)
            if log_decay is not None:
                if REVERSE:
                    weight = tl.exp2(tl.minimum(inclusive[None, :] - inclusive[:, None], 0.0))
                else:
                    weight = tl.exp2(tl.minimum(inclusive[:, None] - inclusive[None, :], 0.0))
                weight = tl.where(before, weight, 0.0)
            else:
                weight = tl.where(before, 1.0, 0.0)
            if past is not None:
                if not REVERSE:
                    weight *= past_weight[None, :]
                elif dot_with is None:
                    weight *= past_weight[:, None]
            if dot_with is None:
                weight = tl.where(same, own_weight[:, None], weight)
            scores *= weight
            if NORMALIZE:
                seen = tl.sum(query_tile.to(tl.float32) * column[None, :], 1)
                total = tl.sum(scores, 1) + row_factor * seen + epsilon
            weighted_scores = scores.to(value_tile.dtype)

            result = tl.dot(query_tile, state.to(query_tile.dtype), input_precision=PRECISION)
            if lane is not None:
                if REVERSE:
                    result += row[None, :]
                else:
                    result += lane_weight[:, None] * row[None, :]
            result *= row_factor[:, None]
            result_mask = row_ok[:, None] & value_ok[None, :]
            if dot_with is not None:
                # The part that decays, apart from the diagonal: its dot product with the operand it is
                # the gradient of is what the decays' gradient is made of.
                result = tl.dot(weighted_scores, value_tile, result, input_precision=PRECISION)
                other = tl.load(
                    dot_with + (origin_row * dot_heads + head * dot_heads // heads) * VALUE_DIM
                    + (rows[:, None] * (dot_heads * VALUE_DIM) + values[None, :]),
                    mask=result_mask, other=0.0,
                )  # fmt: skip
                tl.store(
                    dot_out + (value_block * total_rows + origin_row) * heads + row_offsets,
                    tl.sum(result * other.to(tl.float32), 1), mask=row_ok,
                )  # fmt: skip
                if past is not None:
                    if REVERSE:
                        result *= past_weight[:, None]
                result = tl.dot(own_scores, value_tile, result, input_precision=PRECISION)
            else:
                if past is not None:
                    if REVERSE:
                        result *= past_weight[:, None]
                result = tl.dot(weighted_scores, value_tile, result, input_precision=PRECISION)
                if NORMALIZE:
                    result /= total[:, None]
                    tl.store(
                        denominator + origin_row * heads + row_offsets, total, mask=row_ok & (value_block == 0)
                    )
            tl.store(
                output + (origin_row * heads + head) * VALUE_DIM + (rows[:, None] * (heads * VALUE_DIM) + values[None, :]),
                result.to(output.dtype.element_ty), mask=result_mask,
            )  # fmt: skip

        if log_decay is not None:
            carry = tl.exp2(chunk_decay)
            total_decay += chunk_decay
            state *= carry
            column *= carry
            row *= carry
        weighted = value_tile.to(tl.float32) * column_factor[:, None]
        if NORMALIZE:
            column += tl.sum(key_tile.to(tl.float32) * column_factor[:, None], 0)
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
        if decay_out is not None:
            if value_block == 0:
                tl.store(decay_out + slot * heads + head, total_decay)


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


def _choose(device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
    """64 rows feed a warpgroup; float32 operands take twice the shared memory, wide keys more still."""
    bytes_per_row = variant["BLOCK_K"] * (4 if dtype == "fp32" else 2)
    if bytes_per_row > 256 or device.shared_memory < 160 * 1024:
        return NARROW
    return WIDE


TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDE = Tile({"BLOCK_M": 64, "BLOCK_V": 64}, num_warps=4, num_stages=2)
NARROW = Tile({"BLOCK_M": 64, "BLOCK_V": 32}, num_warps=4, num_stages=1)



def _variant(
    key_dim: int, value_dim: int, rank: int, reverse: bool, normalize: bool, transposed: bool, columns: int, precision: str
) -> dict[str, Any]:
    """The constants of one pass, apart from its tile."""
    return {
        "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "RANK": rank, "REVERSE": reverse, "NORMALIZE": normalize,
        "TRANSPOSED": transposed, "STATE_COLUMNS": columns,
        "BLOCK_K": max(16, triton.next_power_of_2(key_dim)), "PRECISION": precision,
    }  # fmt: skip


def _declared(**changes: Any) -> dict[str, Any]:
    """A pass for the audit: constants by name, and the tensors it does not get as None."""
    usual: dict[str, Any] = {
        "key_dim": 128, "value_dim": 64, "rank": 1, "reverse": False, "normalize": False, "transposed": False,
        "columns": 64, "precision": "tf32x3",
    }  # fmt: skip
    usual |= {name: changes.pop(name) for name in usual if name in changes}
    absent = dict.fromkeys(("lane", "dot_with", "dot_out", "denominator", "starts", "lengths", "decay_out"))
    for name in changes.pop("present", ()):
        del absent[name]
    return _variant(**usual) | absent | dict.fromkeys(changes.pop("absent", ()))


_WEIGHTS = ("log_decay", "past", "diagonal")
_DOTS = ("dot_with", "dot_out")
SCAN = KernelSpec(
    name="linear_attention.scan",
    function=_scan,
    signature={
        **dict.fromkeys(("query", "key", "value", "output", "dot_with"), "*{dtype}"),
        **dict.fromkeys(
            ("log_decay", "past", "diagonal", "lane", "state_in", "state_out", "decay_out", "dot_out", "denominator"),
            "*fp32",
        ),
        **dict.fromkeys(("starts", "lengths"), "*i64"),
        **dict.fromkeys(("length", "num_segments", "segment_length", "total_rows"), "i64"),
        **dict.fromkeys(("heads", "query_heads", "key_heads", "value_heads", "dot_heads"), "i32"),
        "epsilon": "fp32",
    },
    tiles=(WIDE, NARROW),
    variants=(
        _declared(),
        _declared(key_dim=64, value_dim=128, transposed=True, present=_DOTS),
        _declared(key_dim=64, value_dim=128, transposed=True, present=_DOTS, reverse=True),
        _declared(reverse=True),
        _declared(rank=4),
        _declared(rank=4, key_dim=64, value_dim=128, transposed=True, present=_DOTS, reverse=True),
        _declared(key_dim=64, value_dim=64, absent=_WEIGHTS),
        _declared(value_dim=64, columns=65, normalize=True, absent=_WEIGHTS, present=("denominator",)),
        _declared(
            key_dim=64, value_dim=128, columns=65, transposed=True, reverse=True, absent=_WEIGHTS, present=("lane",)
        ),
        _declared(present=("starts", "lengths")),
        _declared(absent=("query", "output"), present=("decay_out",)),
        _declared(key_dim=256, value_dim=64),
    ),
    matrix_units=("bf16", "fp16", "fp32"),
    choose=_choose,
)
COMBINE = KernelSpec(
    name="linear_attention.combine",
    function=_combine,
    signature={
        **dict.fromkeys(("local", "decay", "initial", "entering", "final"), "*fp32"),
        "num_segments": "i64", "heads": "i32", "state_size": "i32",
    },  # fmt: skip
    tiles=(Tile({"BLOCK": 1024}, num_warps=4),),
    variants=({"REVERSE": False}, {"REVERSE": True}),
    dtypes=("fp32",),
)
KERNELS = [SCAN, COMBINE]


@dataclass
class _Problem:
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

    @property
    def rows(self) -> int:
        return self.batch_size * self.length * self.rank

    def empty_rows(self, like: Tensor, *shape: int) -> Tensor:
        """Output over all tokens; zero where documents may leave padding."""
        make = torch.empty if self.starts is None else torch.zeros
        return make(shape, dtype=like.dtype, device=like.device)

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
        want_state: bool = False,
        state_width: tuple[int, int],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Outputs (B, L, R, H, V), state after the walk, row dots (B, L, R, H), denominators (B, L, R, H).

        The state is stored as (documents, H, *state_width) whichever way it is read:
        ``transposed`` reads its last dimension as the key's.
        """
        key_dim, value_dim = key.shape[-1], value.shape[-1]
        device = device_properties(value.device.index)
        variant = _variant(
            key_dim, value_dim, self.rank, reverse, normalize, transposed, state_width[1],
            _precision(device, value.dtype),
        )  # fmt: skip
        tile = SCAN.tile(device, variant, dtype_name(value.dtype))
        block_v, tokens = tile.constants["BLOCK_V"], tile.constants["BLOCK_M"] // self.rank
        value_blocks = triton.cdiv(value_dim, block_v)
        programs = value_blocks * self.heads * self.documents
        wanted = min(triton.cdiv(2 * device.multiprocessors, programs), triton.cdiv(self.length, 4 * tokens))
        segment_length = triton.cdiv(triton.cdiv(self.length, max(wanted, 1)), tokens) * tokens
        segments = max(triton.cdiv(self.length, max(segment_length, 1)), 1)

        output = self.empty_rows(value, self.batch_size, self.length, self.rank, self.heads, value_dim)
        shape = (self.batch_size, self.length, self.rank, self.heads)
        dots = None if dot_with is None else self.empty_rows(output.float()[..., :0], value_blocks, *shape)
        denominators = self.empty_rows(output.float()[..., :0], *shape) if normalize else None
        state_size = state_width[0] * state_width[1]
        final = None
        if want_state:
            final = value.new_empty((self.documents, self.heads, *state_width), dtype=torch.float32)

        def launch(state_in: Tensor | None, state_out: Tensor | None, decay_out: Tensor | None, outputs: bool) -> None:
            _scan[(programs * segments,)](
                query, key, value, output if outputs else None, self.log_decay, self.past, self.diagonal, lane,
                state_in, state_out, decay_out, dot_with if outputs else None, dots if outputs else None,
                denominators if outputs else None,
                self.starts, self.lengths, self.length, segments, segment_length, self.rows,
                self.heads, query.shape[-2], key.shape[-2], value.shape[-2],
                1 if dot_with is None else dot_with.shape[-2],
                self.epsilon,
                **variant, **tile.launch(),
            )  # fmt: skip

        if segments > 1:
            local = value.new_empty((self.documents * segments, self.heads, *state_width), dtype=torch.float32)
            decay = local.new_zeros((self.documents * segments, self.heads))
            launch(None, local, decay, outputs=False)
            entering = torch.empty_like(local)
            after = final if final is not None else torch.empty_like(local[: self.documents])
            _combine[(self.documents * self.heads * triton.cdiv(state_size, COMBINE.tiles[0].constants["BLOCK"]),)](
                local, decay, state, entering, after, segments, self.heads, state_size,
                REVERSE=reverse, **COMBINE.tiles[0].launch(),
            )  # fmt: skip
            launch(entering, None, None, outputs=True)
        else:
            launch(state, final, None, outputs=True)
        return output, final, None if dots is None else dots.sum(0), denominators


def supports(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if v.dtype not in TRITON_DTYPES:
        return f"it computes in bfloat16, float16 or float32, not {v.dtype}"
    if v.shape[2] > NARROW.constants["BLOCK_M"]:
        return f"its tile of {NARROW.constants['BLOCK_M']} rows does not hold rank {v.shape[2]}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"it holds key and value widths up to 256, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def _precision(device: Device, dtype: torch.dtype) -> str:
    """Float32 products in three TF32 steps where the matrix units have it; exact elsewhere."""
    return "tf32x3" if dtype == torch.float32 and device.backend == "cuda" else "ieee"


def _problem(
    v: Tensor, log_decay: Tensor | None, past: Tensor | None, diagonal: Tensor | None,
    starts: Tensor | None, lengths: Tensor | None, epsilon: float,
) -> _Problem:  # fmt: skip
    batch_size, length, rank, heads, _ = v.shape
    return _Problem(batch_size, length, rank, heads, log_decay, past, diagonal, starts, lengths, epsilon)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(v, log_decay, past_weight, diagonal_weight, starts, lengths, epsilon)
    width = (q.shape[-1], v.shape[-1] + normalize)
    y, final, _, denominator = problem.scan(
        q, k, v, initial_state, normalize=normalize, want_state=True, state_width=width
    )
    assert final is not None
    return y, final, final.new_empty(0) if denominator is None else denominator


def _sum_groups(gradient: Tensor, groups: int) -> Tensor:
    """(..., H, N) to (..., G, N): the sum over the heads that share a group, in float32."""
    heads = gradient.shape[-2]
    if heads == groups:
        return gradient
    split = gradient.unflatten(-2, (groups, heads // groups))
    return split.sum(-2, dtype=torch.float32).to(gradient.dtype)


def _decay_gradient(
    change: Tensor, ends: Tensor, starts: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Gradient of log_decay from that of its running sum: (B, L, H).

    ``change`` (B, L, H) is the gradient of c at each token, ``ends`` (documents, H) that of the last
    token's c through the final state. Each token's decay is in every c from it to its document's
    end; the sums are taken in float64.
    """
    batch_size, length, heads = change.shape
    if starts is None or lengths is None:
        change = change.double()
        change[:, -1] += ends
        return change.flip(1).cumsum(1).flip(1).to(ends.dtype)
    table = token_table(starts, lengths, batch_size, length)
    change = change.double() + torch.where(table.last[..., None], ends.double()[table.document], 0.0)
    change = torch.where(table.valid[..., None], change, 0.0).reshape(-1, heads)
    total = change.cumsum(0)
    last = (starts + lengths - 1).clamp_min(0)[table.document.reshape(-1)]
    suffix = (total[last] - total + change).view(batch_size, length, heads)
    return torch.where(table.valid[..., None], suffix, 0.0).to(ends.dtype)


def _diagonal_gradient(problem: _Problem, q: Tensor, k: Tensor, v: Tensor, grad_y: Tensor, lane: Tensor | None) -> Tensor:
    """sum over r, rho of (q_r . k_rho) (dY_r . v_rho + lane_r): (B, L, H), float32."""
    groups = max(q.shape[3], k.shape[3])
    scores = torch.einsum("blrgn,blsgn->blrsg", *(_heads(x, groups).float() for x in (q, k)))
    own = torch.einsum("blrhp,blshp->blrsh", grad_y.float(), v.float())
    if lane is not None:
        own = own + lane[:, :, :, None]
    result = (_heads(scores.unsqueeze(-1), problem.heads).squeeze(-1) * own).sum((2, 3))
    if problem.starts is None or problem.lengths is None:
        return result
    valid = token_table(problem.starts, problem.lengths, problem.batch_size, problem.length).valid
    return torch.where(valid[..., None], result, 0.0)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(..., G, N) to (..., H, N): head h reads group h * G // H."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
    y: Tensor,
    final_state: Tensor,
    denominator: Tensor,
) -> tuple[Tensor, ...]:
    problem = _problem(v, log_decay, past_weight, diagonal_weight, starts, lengths, epsilon)
    width = (q.shape[-1], v.shape[-1] + normalize)
    grad_y, grad_state = grad_y.contiguous(), grad_state.float().contiguous()
    lane = None
    if normalize:
        total = denominator if starts is None else torch.where(denominator == 0, 1.0, denominator)
        scaled = grad_y.float() / total[..., None]
        lane = -(scaled * y.float()).sum(-1)
        grad_y = scaled.to(v.dtype)
    decays = log_decay is not None
    grad_q, final, query_dot, _ = problem.scan(
        grad_y, v, k, initial_state, transposed=True, lane=lane, dot_with=q if decays else None,
        want_state=decays, state_width=width,
    )  # fmt: skip
    grad_k, grad_initial, key_dot, _ = problem.scan(
        v, grad_y, q, grad_state, transposed=True, reverse=True, lane=lane,
        dot_with=k if decays or past_weight is not None else None,
        want_state=initial_state is not None, state_width=width,
    )  # fmt: skip
    grad_v, _, _, _ = problem.scan(k, q, grad_y, grad_state, reverse=True, state_width=width)

    none = v.new_empty(0)
    grad_past = none if key_dot is None else key_dot.sum(2)
    grad_log_decay = none
    if decays:
        assert query_dot is not None and final is not None
        change = query_dot.sum(2) - (grad_past if past_weight is None else grad_past * past_weight)
        grad_log_decay = _decay_gradient(change, (final * grad_state).sum((-1, -2)), starts, lengths)
    grad_diagonal = none
    if diagonal_weight is not None:
        grad_diagonal = _diagonal_gradient(problem, q, k, v, grad_y, lane)
    return (
        _sum_groups(grad_q, q.shape[-2]),
        _sum_groups(grad_k, k.shape[-2]),
        grad_v,
        grad_log_decay,
        none if past_weight is None else grad_past,
        grad_diagonal,
        none if grad_initial is None else grad_initial,
    )
