"""Feature attention on a GPU: the pass that makes outputs, the gradient of the values, and states.

With a chunk of Q tokens, phi the feature map, M the causal mask and c the in-chunk sums of the log
decays, the forward is linear attention whose features exist in registers and shared memory alone:

    Y = [M ∘ e^{c_i-c_j} ∘ phi(Q) phi(K)^T] V + e^{c_i} phi(Q) S,    S <- e^{c_Q} S + phi(K)^T (e^{c_Q-c_j} V)

and dV is the same with keys and queries exchanged, back to front. Taylor's scores are
1 + s + s^2 / 2 of the raw products, so that its features meet only the state.

hedgehog_exp keeps the logarithms: with m the running maximum of log phi(k), feature by feature,
the state holds sum_j e^{log phi(k_j) - m} v_j^T and is rescaled where m grows; a query reads it with
e^{log phi(q) + m - alpha}, alpha the largest exponent of the query, which the divisor cancels. Back
to front the queries' exponents are log phi(q) - log divisor, whose products with phi(k) never
exceed 1.

Tiling as in ``linear_attention.triton_scan``: a program walks one segment of one document for one
head and one block of the value width, the state of every block of features in registers in
float32. Features of keys stand transposed (features x tokens), a product of their own: that tile
is the right operand of the scores and the left one of the state, and no result of a product is
ever transposed. When documents x heads do not fill the GPU, documents are cut into segments.

Bytes a token and head, bf16: q, k, v are read once and y is written once, 2 (2 D + 2 P); the
divisor costs 4 more and nothing else is written: 512 + 4 for D = P = 64 (the roofline's 512), 324
for Taylor with D = 16, P = 64. A prefix (feature_attention_state) reads k and v alone, 2 (D + P)
a prefix token: 640 with half the tokens in the prefix at D = P = 64, 404 for JRT's shape. A second
value block (tiles hold 16 or 32 values) reads q and k again, from the L2 cache as a rule. Cut into segments,
keys and values are read twice, and a state of 4 F (P + 1) bytes is written and read for each.
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
    log_features,
    project,
    state_rows,
)
from seqmodels.ops.linear_attention.triton_scan import _tile

TINY = tl.constexpr(1e-37)


@triton.jit
def span_of(starts, lengths, length, num_segments, segment_length, slot):
    """(row of the batch, first token in it, number of tokens, token number of the row's first) of a segment."""
    length = length.to(tl.int64)
    document = slot // num_segments.to(tl.int32)
    offset = (slot % num_segments.to(tl.int32)) * segment_length.to(tl.int64)
    if starts is not None:
        batch_row = 0
        first = tl.load(starts + document) + offset
        size = tl.load(lengths + document) - offset
        row_origin = tl.full((), 0, tl.int64)
    else:
        batch_row = document
        first = offset
        size = length - offset
        row_origin = document * length
    return batch_row, first, tl.minimum(tl.maximum(size, 0), segment_length).to(tl.int32), row_origin


@triton.jit
def decay_factors(log_decay, origin, tokens, row_ok, head, HEADS: tl.constexpr, REVERSE: tl.constexpr):
    """(in-chunk sums, the chunk's, factors of a row's view of the state before and of a column's share after)."""
    steps = tl.load(log_decay + origin * HEADS + tokens * HEADS + head, mask=row_ok, other=0.0) * LOG2E
    inclusive = tl.cumsum(steps, 0)
    total = tl.sum(steps, 0)
    remaining = tl.exp2(total - inclusive)
    elapsed = tl.exp2(inclusive)
    return inclusive, total, remaining if REVERSE else elapsed, elapsed if REVERSE else remaining


@triton.jit
def masked_scores(scores, position, inclusive, REVERSE: tl.constexpr):
    """Scores of pairs that see each other, decayed; zero elsewhere. ``inclusive``: in-chunk sums of decays, or None."""
    rows, columns = position[:, None], position[None, :]
    seen = rows <= columns if REVERSE else rows >= columns
    if inclusive is not None:
        distance = inclusive[None, :] - inclusive[:, None] if REVERSE else inclusive[:, None] - inclusive[None, :]
        scores *= tl.exp2(tl.where(seen, distance, float("-inf")))
    else:
        scores = tl.where(seen, scores, 0.0)
    return scores


@triton.jit(do_not_specialize=["length", "num_segments", "segment_length"])
def _scan(
    query, key, value, query_weight, key_weight,
    output, log_decay, lane, offset, state_in, scale_in, state_out, scale_out, decay_out, denominator,
    starts, lengths, length, num_segments, segment_length,
    epsilon,
    FEATURE_MAP: tl.constexpr, HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    FEATURES: tl.constexpr, STATE_COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One segment of one document, one head, one block of the value width.

    REVERSE walks from the back and reads row j, column i as "key j seen by query i"; ``query`` then holds the
    forward's keys. In reverse ``lane`` is the gradient of each query's divisor, which the state's last column
    collects as the values' ones do in the forward, and ``offset`` the logarithm of each divisor, for hedgehog_exp.
    A pointer that is None switches its term off; without ``output`` only the state is made.
    """
    value_block = tl.program_id(0) % tl.cdiv(VALUE_DIM, BLOCK_V)
    rest = tl.program_id(0) // tl.cdiv(VALUE_DIM, BLOCK_V)
    head = rest % HEADS
    slot = rest // HEADS
    batch_row, first, size, row_origin = span_of(starts, lengths, length, num_segments, segment_length, slot)

    PRECISION: tl.constexpr = "ieee"  # of float32, which only the interpreter runs
    EXPONENTIAL: tl.constexpr = FEATURE_MAP == "hedgehog_exp"
    TAYLOR: tl.constexpr = FEATURE_MAP == "taylor"
    COLUMN: tl.constexpr = NORMALIZE or lane is not None
    tokens = tl.arange(0, BLOCK_M)
    value_start = value_block * BLOCK_V
    values = value_start + tl.arange(0, BLOCK_V)
    value_ok = (values < VALUE_DIM) if VALUE_DIM % BLOCK_V else (values >= 0)

    state_offset = (slot.to(tl.int64) * HEADS + head) * (FEATURES * STATE_COLUMNS)
    scale_offset = (slot.to(tl.int64) * HEADS + head) * FEATURES
    states = ()
    columns = ()  # the normaliser: what the values' column of ones accumulates
    tops = ()  # running maxima of hedgehog_exp
    for part in tl.static_range(PARTS):
        rows, stored, scale = state_rows(part, 0, FEATURE_MAP, BLOCK_F, BLOCK_U, WIDTH)
        if state_in is not None:
            at = state_in + state_offset + rows[:, None] * STATE_COLUMNS
            state = tl.load(at + values[None, :], mask=stored[:, None] & value_ok[None, :], other=0.0)
            states += (state * scale[:, None],)
        else:
            states += (tl.zeros((BLOCK_F, BLOCK_V), dtype=tl.float32),)
        if COLUMN:
            if state_in is not None:
                column = tl.load(state_in + state_offset + rows * STATE_COLUMNS + VALUE_DIM, mask=stored, other=0.0)
                columns += (column * scale,)
            else:
                columns += (tl.zeros((BLOCK_F,), dtype=tl.float32),)
        if EXPONENTIAL:
            if scale_in is not None:
                tops += (tl.load(scale_in + scale_offset + rows, mask=stored, other=NO_KEY),)
            else:
                tops += (tl.full((BLOCK_F,), NO_KEY, dtype=tl.float32),)
    total_decay = 0.0

    key_map = None if key_weight is None else load_weight(key_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, True)
    query_map = (
        None if query_weight is None else load_weight(query_weight, head, KEY_DIM, WIDTH, BLOCK_K, BLOCK_U, False)
    )
    num_chunks = tl.cdiv(size, BLOCK_M)
    # Without disable_licm every tile's addresses are computed once and held in registers for the whole loop.
    for step in tl.range(0, num_chunks, disable_licm=True):
        chunk = num_chunks - 1 - step if REVERSE else step
        local = first + chunk * BLOCK_M
        origin = row_origin + local
        # Positions, not offsets inside the chunk, so that the masks made of them are not kept in registers.
        position = chunk * BLOCK_M + tokens
        row_ok = position < size
        key_tile = _tile(
            key, batch_row, head * KEY_HEADS // HEADS, local.to(tl.int32), origin, 0, row_ok,
            KEY_HEADS, KEY_DIM, BLOCK_M, BLOCK_K, TMA, MASKED,
        )  # fmt: skip
        value_tile = _tile(
            value, batch_row, head, local.to(tl.int32), origin, value_start, row_ok,
            HEADS, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, MASKED,
        )  # fmt: skip
        if log_decay is not None:
            inclusive, chunk_decay, row_factor, column_factor = decay_factors(
                log_decay, origin, tokens, row_ok, head, HEADS, REVERSE
            )
        else:
            inclusive = None
        key_u = project(key_tile, key_map, 0, PRECISION)
        if TAYLOR:
            key_u = key_u.to(key_tile.dtype)
        if EXPONENTIAL:
            if offset is not None:
                shift = tl.load(offset + (origin + tokens) * HEADS + head, mask=row_ok, other=0.0)
            risen = ()
            for part in tl.static_range(PARTS):
                logarithm = log_features(key_u, part, WIDTH, BLOCK_F, 0)
                if offset is not None:
                    logarithm -= shift[None, :]
                risen += (tl.maximum(tops[part], tl.max(tl.where(row_ok[None, :], logarithm, NO_KEY), 1)),)

        if output is not None:
            query_tile = _tile(
                query, batch_row, head * QUERY_HEADS // HEADS, local.to(tl.int32), origin, 0, row_ok,
                QUERY_HEADS, KEY_DIM, BLOCK_M, BLOCK_K, TMA, MASKED,
            )  # fmt: skip
            query_u = project(query_tile, query_map, 1, PRECISION)
            if TAYLOR:
                query_u = query_u.to(query_tile.dtype)
            if EXPONENTIAL:
                alpha = tl.full((BLOCK_M,), NO_KEY, dtype=tl.float32)
                for part in tl.static_range(PARTS):
                    alpha = tl.maximum(
                        alpha, tl.max(log_features(query_u, part, WIDTH, BLOCK_F, 1) + risen[part][None, :], 1)
                    )
            result = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
            if NORMALIZE:
                total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            if TAYLOR:
                # Its scores wait for no features: with them done first, their registers are free for the features.
                scores = tl.dot(query_u, key_u, input_precision=PRECISION) * WIDTH**-0.5
                scores = 1 + scores + 0.5 * scores * scores
                scores = masked_scores(scores, position, inclusive, REVERSE)
                if NORMALIZE:
                    total += tl.sum(scores, 1)
                result = tl.dot(scores.to(value_tile.dtype), value_tile, result, input_precision=PRECISION)
            else:
                scores = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)

        next_states = ()
        next_columns = ()
        for part in tl.static_range(PARTS):
            state = states[part]
            if COLUMN:
                column = columns[part]
            if EXPONENTIAL:
                logarithm = log_features(key_u, part, WIDTH, BLOCK_F, 0)
                if offset is not None:
                    logarithm -= shift[None, :]
                key_phi = tl.exp2((logarithm - risen[part][:, None]) * LOG2E)
                shrink = tl.exp2((tops[part] - risen[part]) * LOG2E)
                state *= shrink[:, None]
                if COLUMN:
                    column *= shrink
                key_phi = tl.where(row_ok[None, :], key_phi, 0.0)
            elif not TAYLOR:
                key_phi = features(key_u, part, FEATURE_MAP, WIDTH, BLOCK_F, 0, PRECISION)
                key_phi = tl.where(row_ok[None, :], key_phi, 0.0)
            if output is not None:
                if EXPONENTIAL:
                    query_phi = tl.exp2(
                        (log_features(query_u, part, WIDTH, BLOCK_F, 1) + (risen[part][None, :] - alpha[:, None]))
                        * LOG2E
                    )
                else:
                    query_phi = features(query_u, part, FEATURE_MAP, WIDTH, BLOCK_F, 1, PRECISION)
                if not TAYLOR:
                    scores = tl.dot(
                        query_phi.to(value_tile.dtype), key_phi.to(value_tile.dtype), scores, input_precision=PRECISION
                    )
                if log_decay is not None:
                    query_phi *= row_factor[:, None]
                if NORMALIZE:
                    total += tl.sum(query_phi * column[None, :], 1)
                result = tl.dot(
                    query_phi.to(value_tile.dtype), state.to(value_tile.dtype), result, input_precision=PRECISION
                )
            if TAYLOR:
                key_phi = features(key_u, part, FEATURE_MAP, WIDTH, BLOCK_F, 0, PRECISION)
                _, _, scale = state_rows(part, 0, FEATURE_MAP, BLOCK_F, BLOCK_U, WIDTH)
                key_phi = tl.where(row_ok[None, :], key_phi * (scale * scale)[:, None], 0.0)
            if log_decay is not None:
                carry = tl.exp2(chunk_decay)
                state *= carry
                key_phi *= column_factor[None, :]
                if COLUMN:
                    column *= carry
            if lane is not None:
                lane_weight = tl.load(lane + (origin + tokens) * HEADS + head, mask=row_ok, other=0.0)
                next_columns += (column + tl.sum(key_phi * lane_weight[None, :], 1),)
            elif NORMALIZE:
                next_columns += (column + tl.sum(key_phi, 1),)
            next_states += (tl.dot(key_phi.to(value_tile.dtype), value_tile, state, input_precision=PRECISION),)
        states = next_states
        columns = next_columns
        if EXPONENTIAL:
            tops = risen

        if output is not None:
            if not TAYLOR:
                scores = masked_scores(scores, position, inclusive, REVERSE)
                if NORMALIZE:
                    total += tl.sum(scores, 1)
                result = tl.dot(scores.to(value_tile.dtype), value_tile, result, input_precision=PRECISION)
            token_at = (origin + tokens) * HEADS + head
            if NORMALIZE:
                if EXPONENTIAL:
                    # A query whose keys all lie e^87 below a later one of its chunk is lost: zero, without a gradient.
                    kept = tl.where(total > TINY, alpha + tl.log2(total) / LOG2E, -NO_KEY)
                    total += TINY
                else:
                    total += epsilon
                    kept = total
                result /= total[:, None]
                tl.store(denominator + token_at, kept, mask=row_ok & (value_block == 0))
            elif EXPONENTIAL:
                result *= tl.exp2(tl.minimum(alpha, LARGEST) * LOG2E)[:, None]
            output_at = (
                output + (origin * HEADS + head) * VALUE_DIM + tokens[:, None] * (HEADS * VALUE_DIM) + values[None, :]
            )
            tl.store(output_at, result.to(output.dtype.element_ty), mask=row_ok[:, None] & value_ok[None, :])
        if log_decay is not None:
            total_decay += chunk_decay

    if state_out is not None:
        later = (num_chunks * BLOCK_M < size).to(tl.int32)
        values = value_start + tl.arange(0, BLOCK_V) + later
        for part in tl.static_range(PARTS):
            rows, stored, scale = state_rows(part, later, FEATURE_MAP, BLOCK_F, BLOCK_U, WIDTH)
            at = state_out + state_offset + rows[:, None] * STATE_COLUMNS
            tl.store(at + values[None, :], states[part] / scale[:, None], mask=stored[:, None] & value_ok[None, :])
            first_block = stored & (value_block == 0)
            if COLUMN:
                tl.store(
                    state_out + state_offset + rows * STATE_COLUMNS + VALUE_DIM, columns[part] / scale, mask=first_block
                )
            if EXPONENTIAL:
                tl.store(scale_out + scale_offset + rows, tops[part], mask=first_block)
        if decay_out is not None:  # noqa: SIM102 (a constant beside a value known at run time)
            if value_block == 0:
                tl.store(decay_out + slot * HEADS + head, total_decay)


@triton.jit(do_not_specialize=["num_segments"])
def _combine(
    local, local_scale, initial, initial_scale, entering, entering_scale, final, final_scale, num_segments, heads,
    FEATURES: tl.constexpr, STATE_COLUMNS: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chains states of segments that stand relative to e^scale, feature by feature: hedgehog_exp's."""
    STATE_SIZE: tl.constexpr = FEATURES * STATE_COLUMNS
    blocks = tl.cdiv(STATE_SIZE, BLOCK)
    head = (tl.program_id(0) // blocks) % heads
    document = (tl.program_id(0) // blocks // heads).to(tl.int64)
    lanes = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = lanes < STATE_SIZE
    features = lanes // STATE_COLUMNS
    first = ok & (lanes % STATE_COLUMNS == 0)
    running = tl.zeros((BLOCK,), dtype=tl.float32)
    top = tl.full((BLOCK,), NO_KEY, dtype=tl.float32)
    row = document * heads + head
    if initial is not None:
        running = tl.load(initial + row * STATE_SIZE + lanes, mask=ok, other=0.0)
        top = tl.load(initial_scale + row * FEATURES + features, mask=ok, other=NO_KEY)
    for step in range(num_segments):
        part = num_segments - 1 - step if REVERSE else step
        slot = (document * num_segments + part) * heads + head
        tl.store(entering + slot * STATE_SIZE + lanes, running, mask=ok)
        tl.store(entering_scale + slot * FEATURES + features, top, mask=first)
        here = tl.load(local_scale + slot * FEATURES + features, mask=ok, other=NO_KEY)
        risen = tl.maximum(top, here)
        running *= tl.exp2((top - risen) * LOG2E)
        running += tl.load(local + slot * STATE_SIZE + lanes, mask=ok, other=0.0) * tl.exp2((here - risen) * LOG2E)
        top = risen
    tl.store(final + row * STATE_SIZE + lanes, running, mask=ok)
    tl.store(final_scale + row * FEATURES + features, top, mask=first)
