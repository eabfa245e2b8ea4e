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

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Device, Tile, device_properties

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["length", "num_segments", "segment_length"])
def _scan(
    query, key, value, output, log_decay, past, diagonal, lane,
    state_in, state_out, decay_out, dot_with, dot_out, denominator,
    starts, lengths, length, num_segments, segment_length, total_rows,
    heads, query_heads, key_heads, value_heads, dot_heads,
    state_stride_k, state_stride_v, state_size, epsilon,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
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
    size = tl.minimum(tl.maximum(size, 0), segment_length)

    TOKENS: tl.constexpr = BLOCK_M // RANK
    rows = tl.arange(0, BLOCK_M)
    token = rows // RANK
    keys = tl.arange(0, BLOCK_K)
    values = value_block * BLOCK_V + tl.arange(0, BLOCK_V)
    key_ok = keys < KEY_DIM
    value_ok = values < VALUE_DIM
    if REVERSE:
        before = token[:, None] < token[None, :]
    else:
        before = token[:, None] > token[None, :]
    same = token[:, None] == token[None, :]

    query += head * query_heads // heads * KEY_DIM
    key += head * key_heads // heads * KEY_DIM
    value += head * value_heads // heads * VALUE_DIM

    state_offset = (slot * heads + head) * state_size
    tile_offset = keys[:, None] * state_stride_k + values[None, :] * state_stride_v
    tile_ok = key_ok[:, None] & value_ok[None, :]
    # The normaliser lane: one more value column of the forward, one more key row of the gradients.
    column_offset = keys * state_stride_k + VALUE_DIM * state_stride_v
    row_offset = KEY_DIM * state_stride_k + values * state_stride_v
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
        row_ok = (rows < TOKENS * RANK) & (chunk * TOKENS + token < size)
        row_index = (first + chunk * TOKENS) * RANK + rows
        token_index = (first + chunk * TOKENS + token) * heads + head
        key_tile = tl.load(
            key + row_index[:, None] * key_heads * KEY_DIM + keys[None, :],
            mask=row_ok[:, None] & key_ok[None, :], other=0.0,
        )  # fmt: skip
        value_tile = tl.load(
            value + row_index[:, None] * value_heads * VALUE_DIM + values[None, :],
            mask=row_ok[:, None] & value_ok[None, :], other=0.0,
        )  # fmt: skip
        if log_decay is not None:
            step_decay = tl.load(log_decay + token_index, mask=row_ok & (rows % RANK == 0), other=0.0) * LOG2E
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
            past_weight = tl.load(past + token_index, mask=row_ok, other=0.0)
            if not REVERSE:
                column_factor *= past_weight
        if lane is not None:
            lane_weight = tl.load(lane + row_index * heads + head, mask=row_ok, other=0.0)

        if output is not None:
            query_tile = tl.load(
                query + row_index[:, None] * query_heads * KEY_DIM + keys[None, :],
                mask=row_ok[:, None] & key_ok[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            if lane is not None:
                if REVERSE:
                    scores += lane_weight[None, :]
                else:
                    scores += lane_weight[:, None]
            if diagonal is not None:
                diagonal_weight = tl.load(diagonal + token_index, mask=row_ok, other=0.0)
                equal_scores = tl.where(same, scores * diagonal_weight[:, None], 0.0)
            else:
                equal_scores = tl.where(same, scores, 0.0)
            if log_decay is not None:
                gap = inclusive[:, None] - inclusive[None, :]
                if REVERSE:
                    gap = -gap
                scores *= tl.exp2(tl.minimum(gap, 0.0))
            scores = tl.where(before, scores, 0.0)
            if past is not None:
                if not REVERSE:
                    scores *= past_weight[None, :]

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
                result = tl.dot(scores.to(value_tile.dtype), value_tile, result, input_precision=PRECISION)
                other = tl.load(
                    dot_with + (row_index[:, None] * dot_heads + head * dot_heads // heads) * VALUE_DIM
                    + values[None, :],
                    mask=result_mask, other=0.0,
                )  # fmt: skip
                tl.store(
                    dot_out + (value_block * total_rows + row_index) * heads + head,
                    tl.sum(result * other.to(tl.float32), 1), mask=row_ok,
                )  # fmt: skip
                if past is not None:
                    if REVERSE:
                        result *= past_weight[:, None]
                result = tl.dot(equal_scores.to(value_tile.dtype), value_tile, result, input_precision=PRECISION)
            else:
                if past is not None:
                    if REVERSE:
                        result *= past_weight[:, None]
                        scores *= past_weight[:, None]
                scores += equal_scores
                if NORMALIZE:
                    seen = tl.sum(query_tile.to(tl.float32) * column[None, :], 1)
                    total = tl.sum(scores, 1) + row_factor * seen + epsilon
                result = tl.dot(scores.to(value_tile.dtype), value_tile, result, input_precision=PRECISION)
                if NORMALIZE:
                    result /= total[:, None]
                    tl.store(
                        denominator + row_index * heads + head, total, mask=row_ok & (value_block == 0)
                    )
            tl.store(
                output + (row_index[:, None] * heads + head) * VALUE_DIM + values[None, :],
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


def _choose(device: Device, variant: dict, dtype: str) -> Tile:
    """64 rows feed a warpgroup; float32 operands take twice the shared memory, wide keys more still."""
    bytes_per_row = variant["BLOCK_K"] * (4 if dtype == "fp32" else 2)
    if bytes_per_row > 256 or device.shared_memory < 160 * 1024:
        return NARROW
    return WIDE


WIDE = Tile({"BLOCK_M": 64, "BLOCK_V": 64}, num_warps=4, num_stages=2)
NARROW = Tile({"BLOCK_M": 64, "BLOCK_V": 32}, num_warps=4, num_stages=1)


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
        block_k = max(16, triton.next_power_of_2(key_dim))
        variant = {
            "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "RANK": self.rank, "BLOCK_K": block_k,
            "REVERSE": reverse, "NORMALIZE": normalize,
        }  # fmt: skip
        device = device_properties(value.device.index)
        tile = SCAN.tile(device, variant, dtype_name(value.dtype))
        block_v, tokens = tile.constants["BLOCK_V"], tile.constants["BLOCK_M"] // self.rank
        if tokens < 1:
            raise ValueError(f"rank {self.rank} is larger than the kernel's tile of {tile.constants['BLOCK_M']} rows")
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
        strides = (1, state_width[1]) if transposed else (state_width[1], 1)
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
                *strides, state_size, self.epsilon,
                **variant, PRECISION=_precision(device, value.dtype), **tile.launch(),
            )  # fmt: skip

        if segments > 1:
            local = value.new_empty((self.documents * segments, self.heads, *state_width), dtype=torch.float32)
            decay = local.new_zeros((self.documents * segments, self.heads))
            launch(None, local, decay, outputs=False)
            entering = torch.empty_like(local)
            after = final if final is not None else torch.empty_like(local[: self.documents])
            _combine[(self.documents * self.heads * triton.cdiv(state_size, 1024),)](
                local, decay, state, entering, after, segments, self.heads, state_size,
                REVERSE=reverse, BLOCK=1024, num_warps=4,
            )  # fmt: skip
            launch(entering, None, None, outputs=True)
        else:
            launch(state, final, None, outputs=True)
        return output, final, None if dots is None else dots.sum(0), denominators


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
) -> tuple[Tensor, Tensor]:
    problem = _problem(v, log_decay, past_weight, diagonal_weight, starts, lengths, epsilon)
    width = (q.shape[-1], v.shape[-1] + normalize)
    y, final, _, _ = problem.scan(
        q, k, v, initial_state, normalize=normalize, want_state=True, state_width=width
    )
    assert final is not None
    return y, final


def _sum_groups(gradient: Tensor, groups: int) -> Tensor:
    """(..., H, N) to (..., G, N): the sum over the heads that share a group, in float32."""
    heads = gradient.shape[-2]
    if heads == groups:
        return gradient
    split = gradient.unflatten(-2, (groups, heads // groups))
    return split.sum(-2, dtype=torch.float32).to(gradient.dtype)


def _suffix_sums(x: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    """(B, L, H): the sum of x from each token to the end of its document, summed in float64."""
    batch_size, length, heads = x.shape
    total = x.double().reshape(-1, heads).cumsum(0)
    tokens = torch.arange(batch_size * length, device=x.device)
    if starts is None or lengths is None:
        last = (tokens // length + 1) * length - 1
        inside = None
    else:
        document = torch.searchsorted(starts, tokens, right=True) - 1
        last = (starts + lengths)[document.clamp(min=0)] - 1
        inside = (document >= 0) & (tokens <= last)
        last = last.clamp(0, batch_size * length - 1)
    suffix = total[last] - total + x.reshape(-1, heads)
    if inside is not None:
        suffix = suffix * inside[:, None]
    return suffix.view_as(x).to(x.dtype)


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
) -> tuple[Tensor, ...]:
    problem = _problem(v, log_decay, past_weight, diagonal_weight, starts, lengths, epsilon)
    width = (q.shape[-1], v.shape[-1] + normalize)
    grad_y, grad_state = grad_y.contiguous(), grad_state.float().contiguous()
    lane = None
    if normalize:
        y, _, _, total = problem.scan(q, k, v, initial_state, normalize=True, state_width=width)
        assert total is not None
        if starts is not None:
            total = torch.where(total == 0, 1.0, total)
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
        ends = (final * grad_state).sum((-1, -2))
        grad_log_decay = _suffix_sums(_add_at_ends(change, ends, starts, lengths), starts, lengths)
    grad_diagonal = none
    if diagonal_weight is not None:
        grad_diagonal = _diagonal_gradient(q, k, v, grad_y, lane)
        if starts is not None:
            grad_diagonal = grad_diagonal * _inside(problem, grad_diagonal.device)[..., None]
    return (
        _sum_groups(grad_q, q.shape[-2]),
        _sum_groups(grad_k, k.shape[-2]),
        grad_v,
        grad_log_decay,
        none if past_weight is None else grad_past,
        grad_diagonal,
        none if grad_initial is None else grad_initial,
    )
