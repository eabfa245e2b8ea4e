"""Feature attention on a GPU: the gradients of queries, keys and the learned maps.

With D the gradient of a score, D_ij = dY_i . V_j + lane_i for j <= i (dY the gradient of the
undivided output, ``lane`` the divisor's gradient), S and dS the states before and after a chunk:

    dphi(Q) = D phi(K) + dY S^T          front to back, queries Q, left dY, right V, keys K
    dphi(K) = D^T phi(Q) + V dS^T        back to front, queries K, left V, right dY, keys Q

so one kernel, ``_gradient``, serves both. Features are made again from q and k, and the chain rule
runs in the tile: dphi becomes du, du becomes dx = du W^T and joins dW = x^T du, which each program
sums over its own segment; the host adds the programs' sums in a fixed order. Neither phi nor dphi
nor du reaches memory. Taylor's in-chunk part needs no features: d/ds (1 + s + s^2 / 2) = 1 + s.

For hedgehog_exp the exponents of queries are taken relative to the divisor, log phi(q) - log
divisor + m, and back to front m is the running maximum of log phi(q) - log divisor over later
queries: products with a phi that may see each other never exceed 1.

Everything stands transposed, features x tokens, both halves of Hedgehog's features in one tile of
2 f rows and the learned map as [W, -W]^T: 64 or 128 rows feed one or two warpgroups, a state of
features x values is a left operand as it is, and no result of a product is ever transposed.

Bytes a token and head of the whole backward, bf16, D = P = 64: this kernel reads q, k, v and dY and
writes dq in one pass, 2 * 5 * 64 = 640, the same for dk, and the scan for dv another 2 * 4 * 64 =
512; with the preparation of dY and of the lane from y (2 * 3 * 64) and 4 for each divisor and
lane, 2.2 kB against the 896 of a single pass that would hold all operands at once. No launch holds
more: both states beside both gradients exceed 255 registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqmodels.ops.feature_attention.triton_maps import (
    LARGEST,
    LOG2E,
    NO_KEY,
    features,
    load_weight,
    project,
    selection,
    stacked_features,
    stacked_map,
    state_rows,
    taylor_factors,
    taylor_slots,
)
from seqmodels.ops.feature_attention.triton_scan import decay_factors, span_of
from seqmodels.ops.linear_attention.triton_scan import _tile


@triton.jit
def pull_back(
    u, phi, dphi, FEATURE_MAP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Gradient of u (features x tokens) from that of phi; not Taylor."""
    if FEATURE_MAP == "identity":
        du = dphi
    elif FEATURE_MAP == "relu":
        du = tl.where(u > 0, dphi, 0.0)
    elif FEATURE_MAP == "elu":
        du = dphi * tl.minimum(phi, 1.0)
    else:
        du = dphi * phi
        if FEATURE_MAP == "hedgehog_joint":
            du -= phi * tl.sum(du, 0)[None, :]
        if FEATURE_MAP == "hedgehog_split":
            upper = (tl.arange(0, BLOCK_F) < BLOCK_U)[:, None]
            up, down = tl.sum(tl.where(upper, du, 0.0), 0), tl.sum(tl.where(upper, 0.0, du), 0)
            du -= phi * tl.where(upper, up[None, :], down[None, :])
    return du


@triton.jit(do_not_specialize=["length", "num_segments", "segment_length", "total_rows"])
def _gradient(
    query, key, left, right, query_weight, key_weight,
    query_gradient, weight_gradient, dot_out, log_decay, lane, offset, state_in, scale_in,
    starts, lengths, length, num_segments, segment_length, total_rows,
    FEATURE_MAP: tl.constexpr, HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, FEATURES: tl.constexpr,
    STATE_COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One segment of one document, one head, one block of the value width (whose shares the host adds).

    Without ``left`` only keys and values made the state: their gradient is that of the state alone.
    ``offset`` and ``lane`` belong to the forward's queries: columns here, rows in reverse.
    """
    value_block = tl.program_id(0) % tl.cdiv(VALUE_DIM, BLOCK_V)
    rest = tl.program_id(0) // tl.cdiv(VALUE_DIM, BLOCK_V)
    head = rest % HEADS
    slot = rest // HEADS
    total_rows = total_rows.to(tl.int64)
    batch_row, first, size, row_origin = span_of(starts, lengths, length, num_segments, segment_length, slot)

    PRECISION: tl.constexpr = "ieee"  # of float32, which only the interpreter runs
    EXPONENTIAL: tl.constexpr = FEATURE_MAP == "hedgehog_exp"
    TAYLOR: tl.constexpr = FEATURE_MAP == "taylor"
    HALVES: tl.constexpr = 1 if TAYLOR else BLOCK_F // BLOCK_U
    TYPE: tl.constexpr = query.dtype if TMA else query.dtype.element_ty
    tokens = tl.arange(0, BLOCK_M)
    units = tl.arange(0, BLOCK_U)
    lanes = tl.arange(0, BLOCK_K)
    value_start = value_block * BLOCK_V
    values = value_start + tl.arange(0, BLOCK_V)
    value_ok = (values < VALUE_DIM) if VALUE_DIM % BLOCK_V else (values >= 0)
    # The divisor's gradient is not one of the values: the first block of them carries it.
    once = value_block == 0

    state_offset = (slot.to(tl.int64) * HEADS + head) * (FEATURES * STATE_COLUMNS)
    scale_offset = (slot.to(tl.int64) * HEADS + head) * FEATURES
    states = ()
    columns = ()
    top = tl.full((BLOCK_F,), NO_KEY, dtype=tl.float32)
    for part in tl.static_range(PARTS):
        rows, stored, scale = state_rows(part, 0, FEATURE_MAP, BLOCK_F, BLOCK_U, WIDTH)
        state = tl.zeros((BLOCK_F, BLOCK_V), dtype=tl.float32)
        column = tl.zeros((BLOCK_F,), dtype=tl.float32)
        if state_in is not None:
            state_at = state_in + state_offset + rows * STATE_COLUMNS
            state = tl.load(state_at[:, None] + values[None, :], mask=stored[:, None] & value_ok[None, :], other=0.0)
            state *= scale[:, None]
            if lane is not None:
                column = tl.load(state_at + VALUE_DIM, mask=stored & once, other=0.0) * scale
        states += (state,)
        columns += (column,)
        if EXPONENTIAL and scale_in is not None:
            top = tl.load(scale_in + scale_offset + rows, mask=stored, other=NO_KEY)
    if query_weight is not None:
        weight_sum = tl.zeros((BLOCK_U if TAYLOR else BLOCK_F, BLOCK_K), dtype=tl.float32)
    if not TAYLOR:
        key_map = stacked_map(key_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, HALVES, TYPE, 0)
        query_map = stacked_map(query_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, HALVES, TYPE, 0)
        back_map = stacked_map(query_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, HALVES, TYPE, 1)

    num_chunks = tl.cdiv(size, BLOCK_M)
    for step in tl.range(0, num_chunks, disable_licm=True):
        chunk = num_chunks - 1 - step if REVERSE else step
        local = first + chunk * BLOCK_M
        origin = row_origin + local
        position = chunk * BLOCK_M + tokens
        row_ok = position < size
        token_at = (origin + tokens) * HEADS + head
        key_tile = _tile(
            key, batch_row, head * KEY_HEADS // HEADS, local.to(tl.int32), origin, 0, row_ok,
            KEY_HEADS, KEY_DIM, BLOCK_M, BLOCK_K, TMA, MASKED,
        )  # fmt: skip
        query_tile = _tile(
            query, batch_row, head * QUERY_HEADS // HEADS, local.to(tl.int32), origin, 0, row_ok,
            QUERY_HEADS, KEY_DIM, BLOCK_M, BLOCK_K, TMA, MASKED,
        )  # fmt: skip
        left_tile = _tile(
            left, batch_row, head, local.to(tl.int32), origin, value_start, row_ok,
            HEADS, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, MASKED,
        )  # fmt: skip
        right_tile = _tile(
            right, batch_row, head, local.to(tl.int32), origin, value_start, row_ok,
            HEADS, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, MASKED,
        )  # fmt: skip
        if log_decay is not None:
            inclusive, chunk_decay, row_factor, column_factor = decay_factors(
                log_decay, origin, tokens, row_ok, head, HEADS, REVERSE
            )
        if lane is not None:
            lane_weight = tl.load(lane + token_at, mask=row_ok & once, other=0.0)
        if offset is not None:
            shift = tl.load(offset + token_at, mask=row_ok, other=0.0)

        # Gradients of scores: rows are the tokens of the other side, columns those of this gradient.
        seen = position[:, None] >= position[None, :] if REVERSE else position[:, None] <= position[None, :]
        same = position[:, None] == position[None, :]
        slopes = tl.dot(right_tile, tl.trans(left_tile), input_precision=PRECISION)
        if lane is not None:
            slopes += lane_weight[:, None] if REVERSE else lane_weight[None, :]
        if log_decay is not None:
            # The diagonal is apart: decays have no part in it.
            own_slope = tl.sum(tl.where(same, slopes, 0.0), 0)
            distance = inclusive[:, None] - inclusive[None, :] if REVERSE else inclusive[None, :] - inclusive[:, None]
            slopes *= tl.exp2(tl.where(seen & (position[:, None] != position[None, :]), distance, float("-inf")))
            dots = tl.zeros((BLOCK_M,), dtype=tl.float32)
        else:
            slopes = tl.where(seen, slopes, 0.0)

        if TAYLOR:
            weight = (
                None if key_weight is None else load_weight(key_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, True)
            )
            key_u = project(key_tile, weight, 0, PRECISION).to(TYPE)
            weight = (
                None if key_weight is None else load_weight(key_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, False)
            )
            across = project(key_tile, weight, 1, PRECISION).to(TYPE)
            weight = (
                None
                if query_weight is None
                else load_weight(query_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, True)
            )
            query_u = project(query_tile, weight, 0, PRECISION).to(TYPE)
            scores = tl.dot(across, query_u, input_precision=PRECISION) * WIDTH**-0.5
            if log_decay is not None:
                dots += tl.sum(slopes * (1 + scores + 0.5 * scores * scores), 0)
                slopes = tl.where(same, own_slope[None, :], slopes)
            slopes *= (1 + scores) * WIDTH**-0.5
            du = tl.dot(key_u, slopes.to(TYPE), input_precision=PRECISION)
        else:
            key_u = tl.dot(key_map, tl.trans(key_tile), input_precision=PRECISION)
            query_u = tl.dot(query_map, tl.trans(query_tile), input_precision=PRECISION)

        next_states = ()
        next_columns = ()
        for part in tl.static_range(PARTS):
            state = states[part]
            column = columns[part]
            if TAYLOR:
                _, _, scale = state_rows(part, 0, FEATURE_MAP, BLOCK_F, BLOCK_U, WIDTH)
                key_phi = features(key_u, part, FEATURE_MAP, WIDTH, BLOCK_F, 0, PRECISION) * (scale * scale)[:, None]
            elif EXPONENTIAL:
                real = (tl.arange(0, BLOCK_F) % BLOCK_U < WIDTH)[:, None]
                logarithm = tl.where(real, key_u, NO_KEY)
                if REVERSE:
                    logarithm -= shift[None, :]
                risen = tl.maximum(top, tl.max(tl.where(row_ok[None, :], logarithm, NO_KEY), 1))
                key_phi = tl.exp2((logarithm - risen[:, None]) * LOG2E)
                shrink = tl.exp2((top - risen) * LOG2E)
                state *= shrink[:, None]
                column *= shrink
                top = risen
            else:
                key_phi = stacked_features(key_u, FEATURE_MAP, WIDTH, BLOCK_U, BLOCK_F)
            key_phi = tl.where(row_ok[None, :], key_phi, 0.0)

            dphi = tl.dot(state.to(TYPE), tl.trans(left_tile), input_precision=PRECISION)
            if lane is not None:
                if REVERSE:
                    dphi += column[:, None]
                else:
                    dphi += column[:, None] * lane_weight[None, :]
            if log_decay is not None:
                dphi *= row_factor[None, :]
            if TAYLOR:
                first_factor, second_factor = taylor_factors(query_u, part, WIDTH, BLOCK_F, 0, PRECISION)
                if log_decay is not None:
                    dots += tl.sum(first_factor * second_factor * dphi, 0)
                a, b, _, _, _ = taylor_slots(part, 0, BLOCK_F, WIDTH)
                du = tl.dot(selection(a, TYPE, 1), (dphi * second_factor).to(TYPE), du, input_precision=PRECISION)
                du = tl.dot(selection(b, TYPE, 1), (dphi * first_factor).to(TYPE), du, input_precision=PRECISION)
            else:
                dphi = tl.dot(key_phi.to(TYPE), slopes.to(TYPE), dphi, input_precision=PRECISION)
                if EXPONENTIAL:
                    logarithm = tl.where(real, query_u, NO_KEY) + top[:, None]
                    if not REVERSE:
                        logarithm -= shift[None, :]
                    query_phi = tl.exp2(tl.minimum(logarithm, LARGEST) * LOG2E)
                else:
                    query_phi = stacked_features(query_u, FEATURE_MAP, WIDTH, BLOCK_U, BLOCK_F)
                if log_decay is not None:
                    dots += tl.sum(query_phi * dphi, 0)
                    dphi += own_slope[None, :] * key_phi
                du = pull_back(query_u, query_phi, dphi, FEATURE_MAP, WIDTH, BLOCK_U, BLOCK_F)

            if log_decay is not None:
                carry = tl.exp2(chunk_decay)
                state *= carry
                column *= carry
                key_phi *= column_factor[None, :]
            if lane is not None:
                next_columns += (column + tl.sum(key_phi * lane_weight[None, :] if REVERSE else key_phi, 1),)
            else:
                next_columns += (column,)
            next_states += (tl.dot(key_phi.to(TYPE), right_tile, state, input_precision=PRECISION),)
        states = next_states
        columns = next_columns

        if log_decay is not None:
            tl.store(dot_out + value_block * total_rows * HEADS + token_at, dots, mask=row_ok)
        du = tl.where(row_ok[None, :], du, 0.0)
        if TAYLOR:  # the constant's row has no gradient
            du = tl.where((units < WIDTH)[:, None], du, 0.0)
        narrow = du.to(TYPE)
        if query_weight is not None:
            weight_sum = tl.dot(narrow, query_tile, weight_sum, input_precision=PRECISION)
        if not TAYLOR:
            dx = tl.dot(back_map, narrow, input_precision=PRECISION)
        elif query_weight is not None:
            weight = load_weight(query_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, False)
            dx = tl.dot(weight, narrow, input_precision=PRECISION)
        else:
            dx = du
        lane_ok = (lanes < KEY_DIM) if KEY_DIM % BLOCK_K else (lanes >= 0)
        target = query_gradient + ((value_block * total_rows + origin) * HEADS + head) * KEY_DIM
        tl.store(
            target + lanes[:, None] + tokens[None, :] * (HEADS * KEY_DIM),
            dx.to(query_gradient.dtype.element_ty), mask=lane_ok[:, None] & row_ok[None, :],
        )  # fmt: skip

    if query_weight is not None:
        maps = tl.arange(0, BLOCK_U if TAYLOR else BLOCK_F)
        share = weight_gradient + tl.program_id(0).to(tl.int64) * (HALVES * WIDTH * KEY_DIM)
        row = maps // BLOCK_U * WIDTH + maps % BLOCK_U
        inside = (maps % BLOCK_U < WIDTH)[:, None] & (lanes < KEY_DIM)[None, :]
        tl.store(share + row[:, None] * KEY_DIM + lanes[None, :], weight_sum, mask=inside)
