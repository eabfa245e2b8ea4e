"""Feature maps inside a tile: what the kernels of feature attention share.

A tile of features stands either one row a token (AXIS = 1) or one column a token (AXIS = 0), and
phi is cut into PARTS blocks of BLOCK_F features, each a tile of its own with its own state:

    hedgehog_*            part 0 is the half of u, part 1 that of -u
    taylor                two blocks of 64 pairs, and one with 8 pairs, the 16 linear features and the 1
    elu, relu, identity   one part

Taylor's features need no three-dimensional tile: a feature is x_a x_b, and both factors are
products of the tile with a matrix of zeros and ones, which tensor cores multiply exactly. Pairs
stand by their distance, slot 16 d + a for (a, a + d mod 16), so that a block's pairs follow from
its index; a state in memory keeps the order of ``maps.py``. Widths below 16 leave slots empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NO_KEY = tl.constexpr(-1e30)  # the running maximum before the first key, as in reference.py
LARGEST = tl.constexpr(80.0)  # exponents above it belong to masked pairs; e^80 squared is still a float32
SIDE = tl.constexpr(16)  # the widest u of Taylor
ONE = tl.constexpr(16)  # where its tile of TAYLOR_U holds a 1
TAYLOR_U = tl.constexpr(32)
PAIRS = tl.constexpr(136)


@triton.jit
def tokens_apart(x, AXIS: tl.constexpr):
    """A vector over tokens beside a tile whose features lie along AXIS."""
    return tl.expand_dims(x, AXIS)


@triton.jit
def features_apart(x, AXIS: tl.constexpr):
    """A vector over features beside a tile whose features lie along AXIS."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def taylor_slots(part: tl.constexpr, later, BLOCK_F: tl.constexpr, WIDTH: tl.constexpr):
    """(a, b, scale, row in memory, is it a feature) of a block's slots: feature = scale u_a u_b, with u_ONE = 1."""
    slot = part * BLOCK_F + tl.arange(0, BLOCK_F) + later
    linear = slot - PAIRS
    is_pair = linear < 0
    is_linear = linear < SIDE
    a = tl.where(is_pair, slot % SIDE, tl.where(is_linear, linear, tl.where(linear == SIDE, ONE, -1)))
    b = tl.where(is_pair, (slot % SIDE + slot // SIDE) % SIDE, tl.where(linear <= SIDE, ONE, -1))
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    pair_row = 1 + WIDTH + low * WIDTH - low * (low - 1) // 2 + high - low
    row = tl.where(is_pair, pair_row, tl.where(is_linear, 1 + linear, 0))
    pair_scale = tl.where(a == b, (2 * WIDTH) ** -0.5, WIDTH**-0.5)
    scale = tl.where(is_pair, pair_scale, tl.where(is_linear, WIDTH**-0.25, 1.0))
    stored = (a >= 0) & ((a < WIDTH) | (a == ONE)) & ((b < WIDTH) | (b == ONE))
    return a, b, scale, row, stored


@triton.jit
def state_rows(
    part: tl.constexpr,
    later,
    FEATURE_MAP: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_U: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(row in memory, is it one, scale) of a block's features.

    Taylor's tiles hold features without their scale; the state's hold the keys' with its square. ``later`` is 0;
    behind a loop it comes from a run-time value, or the compiler would keep the addresses made in front of it.
    """
    if FEATURE_MAP == "taylor":
        _, _, scale, row, stored = taylor_slots(part, later, BLOCK_F, WIDTH)
    else:
        lanes = part * BLOCK_F + tl.arange(0, BLOCK_F) + later
        row = lanes // BLOCK_U * WIDTH + lanes % BLOCK_U
        stored = lanes % BLOCK_U < WIDTH
        scale = tl.full((BLOCK_F,), 1.0, dtype=tl.float32)
    return row, stored, scale


@triton.jit
def load_weight(
    weight, head, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One head's (D, WIDTH) of a weight (heads, D, WIDTH), or its transpose, padded with zeros."""
    rows, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_U)
    weight += head * (D * WIDTH)
    if TRANSPOSED:
        offsets = columns[:, None] + rows[None, :] * WIDTH
        inside = (columns < WIDTH)[:, None] & (rows < D)[None, :]
    else:
        offsets = rows[:, None] * WIDTH + columns[None, :]
        inside = (rows < D)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(weight + offsets, mask=inside, other=0.0)


@triton.jit
def project(x, weight, AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """u in float32 from a tile of tokens x (tokens, D): features along AXIS. ``weight`` is transposed with AXIS 0.

    The transposed tile is a product of its own: a transposed result of a product must not be a left operand
    (sm_90 with Triton 3.6 gives wrong numbers).
    """
    if AXIS == 0:
        u = tl.trans(x).to(tl.float32) if weight is None else tl.dot(weight, tl.trans(x), input_precision=PRECISION)
    else:
        u = x.to(tl.float32) if weight is None else tl.dot(x, weight, input_precision=PRECISION)
    return u


@triton.jit
def selection(index, TYPE: tl.constexpr, AXIS: tl.constexpr):
    """Zeros and ones that pick entry ``index`` of u for every feature: features along AXIS."""
    return (features_apart(index, AXIS) == tokens_apart(tl.arange(0, TAYLOR_U), AXIS)).to(TYPE)


@triton.jit
def taylor_factors(
    u, part: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, AXIS: tl.constexpr, PRECISION: tl.constexpr
):
    """The two factors of a block's features without their scale. ``u`` in the operands' dtype."""
    a, b, _, _, _ = taylor_slots(part, 0, BLOCK_F, WIDTH)
    u = tl.where(features_apart(tl.arange(0, TAYLOR_U), AXIS) == ONE, 1.0, u).to(u.dtype)
    if AXIS == 1:
        first = tl.dot(u, selection(a, u.dtype, AXIS), input_precision=PRECISION)
        second = tl.dot(u, selection(b, u.dtype, AXIS), input_precision=PRECISION)
    else:
        first = tl.dot(selection(a, u.dtype, AXIS), u, input_precision=PRECISION)
        second = tl.dot(selection(b, u.dtype, AXIS), u, input_precision=PRECISION)
    return first, second


@triton.jit
def signed(u, part: tl.constexpr):
    return u if part == 0 else -u


@triton.jit
def log_features(u, part: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, AXIS: tl.constexpr):
    """Of hedgehog_exp: u or -u, NO_KEY in the padding."""
    found = signed(u, part)
    if WIDTH % BLOCK_F:
        found = tl.where(features_apart(tl.arange(0, BLOCK_F) < WIDTH, AXIS), found, NO_KEY)
    return found


@triton.jit
def features(
    u, part: tl.constexpr, FEATURE_MAP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, AXIS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(u), block ``part``, in float32; zero in the padding. Not hedgehog_exp; Taylor's without their scale."""
    if FEATURE_MAP == "taylor":
        first, second = taylor_factors(u, part, WIDTH, BLOCK_F, AXIS, PRECISION)
        phi = first * second
    elif FEATURE_MAP == "identity":
        phi = u
    elif FEATURE_MAP == "relu":
        phi = tl.maximum(u, 0.0)
    elif FEATURE_MAP == "elu":
        phi = tl.where(u > 0, u + 1, tl.exp2(tl.minimum(u, 0.0) * LOG2E))
        if WIDTH % BLOCK_F:
            phi = tl.where(features_apart(tl.arange(0, BLOCK_F) < WIDTH, AXIS), phi, 0.0)
    elif FEATURE_MAP == "hedgehog_split":
        logits = log_features(u, part, WIDTH, BLOCK_F, AXIS) * LOG2E
        weights = tl.exp2(logits - tokens_apart(tl.max(logits, AXIS), AXIS))
        phi = weights * tokens_apart(1.0 / tl.sum(weights, AXIS), AXIS)
    else:  # hedgehog_joint; u is zero in the padding, which cannot exceed the maximum of |u|
        top = tokens_apart(tl.max(tl.abs(u), AXIS), AXIS) * LOG2E
        up = tl.exp2(log_features(u, 0, WIDTH, BLOCK_F, AXIS) * LOG2E - top)
        down = tl.exp2(log_features(u, 1, WIDTH, BLOCK_F, AXIS) * LOG2E - top)
        phi = (up if part == 0 else down) * tokens_apart(1.0 / tl.sum(up + down, AXIS), AXIS)
    return phi


@triton.jit
def stacked_map(
    weight, head, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
    HALVES: tl.constexpr, TYPE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """[W, -W] with its columns along AXIS, W alone with one half; the identity stands for no weight."""
    maps = tl.arange(0, HALVES * BLOCK_U)
    row, column = tokens_apart(tl.arange(0, BLOCK_D), AXIS), features_apart(maps % BLOCK_U, AXIS)
    sign = features_apart(tl.where(maps < BLOCK_U, 1.0, -1.0), AXIS)
    if weight is None:
        found = tl.where(row == column, sign, 0.0)
    else:
        inside = (row < D) & (column < WIDTH)
        found = tl.load(weight + head * (D * WIDTH) + row * WIDTH + column, mask=inside, other=0.0) * sign
    return found.to(TYPE)


@triton.jit
def stacked_features(u, FEATURE_MAP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_F: tl.constexpr):
    """phi from [u, -u] along axis 0, both halves at once; not hedgehog_exp nor Taylor."""
    lanes = tl.arange(0, BLOCK_F)
    if FEATURE_MAP == "hedgehog_split" or FEATURE_MAP == "hedgehog_joint":
        logits = tl.where((lanes % BLOCK_U < WIDTH)[:, None], u, NO_KEY) * LOG2E
        if FEATURE_MAP == "hedgehog_split":
            upper = (lanes < BLOCK_U)[:, None]
            up, down = tl.max(tl.where(upper, logits, NO_KEY), 0), tl.max(tl.where(upper, NO_KEY, logits), 0)
            phi = tl.exp2(logits - tl.where(upper, up[None, :], down[None, :]))
            up, down = tl.sum(tl.where(upper, phi, 0.0), 0), tl.sum(tl.where(upper, 0.0, phi), 0)
            phi /= tl.where(upper, up[None, :], down[None, :])
        else:
            phi = tl.exp2(logits - tl.max(logits, 0)[None, :])
            phi *= (1.0 / tl.sum(phi, 0))[None, :]
    else:
        phi = features(u, 0, FEATURE_MAP, WIDTH, BLOCK_F, 0, "ieee")
    return phi
