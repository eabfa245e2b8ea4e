"""Tiles of the linear recurrence on a GPU: loads, stores, and the affine maps of a tile's tokens, scanned.

A token is the map h -> a h + b. ``forward_maps`` returns, for every token of a tile, the composition of all tokens
from the tile's start up to it, ``backward_maps`` the same from the tile's end. Complex values lie as pairs: rows of
2 BLOCK_C floats are loaded whole and split.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compose(a_first, b_first, a, b):
    return a * a_first, a * b_first + b


@triton.jit
def compose_complex(ar_first, ai_first, br_first, bi_first, ar, ai, br, bi):
    return (
        ar * ar_first - ai * ai_first,
        ar * ai_first + ai * ar_first,
        ar * br_first - ai * bi_first + br,
        ar * bi_first + ai * br_first + bi,
    )


@triton.jit
def rows_of(pointer, row, inside, c, channels, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """(real, imaginary) of the given rows, zeros where not ``inside``; twice the same for real channels."""
    if COMPLEX:
        part = tl.arange(0, 2 * BLOCK_C) + 2 * c
        mask = inside[:, None] & (part < 2 * channels)[None, :]
        pairs = tl.load(pointer + row[:, None] * (2 * channels) + part[None, :], mask=mask, other=0.0)
        real, imaginary = tl.split(pairs.reshape(BLOCK_L, BLOCK_C, 2))
    else:
        part = tl.arange(0, BLOCK_C) + c
        mask = inside[:, None] & (part < channels)[None, :]
        real = tl.load(pointer + row[:, None] * channels + part[None, :], mask=mask, other=0.0)
        imaginary = real
    return real, imaginary


@triton.jit
def store_rows(pointer, row, inside, c, channels, real, imaginary, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr,
           BLOCK_C: tl.constexpr):  # fmt: skip
    if COMPLEX:
        part = tl.arange(0, 2 * BLOCK_C) + 2 * c
        mask = inside[:, None] & (part < 2 * channels)[None, :]
        values = tl.join(real, imaginary).reshape(BLOCK_L, 2 * BLOCK_C)
        tl.store(pointer + row[:, None] * (2 * channels) + part[None, :], values, mask=mask)
    else:
        part = tl.arange(0, BLOCK_C) + c
        mask = inside[:, None] & (part < channels)[None, :]
        tl.store(pointer + row[:, None] * channels + part[None, :], real, mask=mask)


@triton.jit
def flags_of(flags, token, t, inside, length):
    """(valid, first, last) of tokens; without flags each row is one document."""
    if flags is None:
        valid = inside
        first = inside & (t == 0)
        last = inside & (t == length - 1)
    else:
        bits = tl.load(flags + token, mask=inside, other=0)
        valid = inside & ((bits & 1) != 0)
        first = inside & ((bits & 2) != 0)
        last = inside & ((bits & 4) != 0)
    return valid, first, last


@triton.jit
def forward_maps(
    decay, x, initial_state, document, flags, row, t, inside, c, length, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(a, b) of the tokens at columns t: on a first token a is 0 and decay times initial state is in b; padding is 0,
    tokens that are not ``inside`` are the identity."""
    token = row * length + t
    valid, first, _ = flags_of(flags, token, t, inside, length)
    source = token if VARYING else tl.zeros_like(token)
    ar, ai = rows_of(decay, source, valid, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
    br, bi = rows_of(x, token, valid, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
    if initial_state is not None:
        slot = tl.zeros_like(token) + row if document is None else tl.load(document + token, mask=first, other=0)
        sr, si = rows_of(initial_state, slot, first, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        if COMPLEX:
            br += ar * sr - ai * si
            bi += ar * si + ai * sr
        else:
            br += ar * sr
    ar = tl.where(first[:, None], 0.0, ar)
    ar = tl.where(inside[:, None], ar, 1.0)
    if COMPLEX:
        ai = tl.where((first | (inside == 0))[:, None], 0.0, ai)
        ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, compose_complex)
    else:
        ar, br = tl.associative_scan((ar, br), 0, compose)
    return ar, ai, br, bi


@triton.jit
def backward_maps(
    decay, document, flags, grad_h, grad_final, row, t, inside, c, length, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(a, b) of g[t] = a g[t+1] + b: a is the conjugated decay of the token behind, 0 at a document's end and in
    padding; b is dL/dh, with the gradient to the final state on a last token."""
    token = row * length + t
    valid, _, last = flags_of(flags, token, t, inside, length)
    slot = tl.zeros_like(token) + row if document is None else tl.load(document + token, mask=inside, other=0)
    er, ei = rows_of(grad_h, token, valid, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
    fr, fi = rows_of(grad_final, slot, last, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
    er += fr
    ei += fi
    source = token + 1 if VARYING else tl.zeros_like(token)
    ar, ai = rows_of(decay, source, valid & (last == 0), c, channels, COMPLEX, BLOCK_L, BLOCK_C)
    ar = tl.where(inside[:, None], ar, 1.0)
    if COMPLEX:
        ar, ai, er, ei = tl.associative_scan((ar, -ai, er, ei), 0, compose_complex, reverse=True)
    else:
        ar, er = tl.associative_scan((ar, er), 0, compose, reverse=True)
    return ar, ai, er, ei


@triton.jit
def apply(ar, ai, br, bi, carry_real, carry_imaginary, COMPLEX: tl.constexpr):
    """The maps of a tile's tokens on the value before the tile."""
    if COMPLEX:
        real = br + ar * carry_real[None, :] - ai * carry_imaginary[None, :]
        imaginary = bi + ar * carry_imaginary[None, :] + ai * carry_real[None, :]
    else:
        real = br + ar * carry_real[None, :]
        imaginary = real
    return real, imaginary


@triton.jit
def pick(values, chosen):
    """The row of a tile where ``chosen``."""
    return tl.sum(tl.where(chosen[:, None], values, 0.0), axis=0)


@triton.jit
def carried(carry, row, segment, used, c, channels, COMPLEX: tl.constexpr, BLOCK_C: tl.constexpr):
    """What another segment hands over, 0 if not ``used``; carry is (rows, segments, channels)."""
    at = tl.zeros([1], tl.int64) + row * tl.num_programs(2) + segment
    real, imaginary = rows_of(carry, at, (at >= 0) & used, c, channels, COMPLEX, 1, BLOCK_C)
    return tl.sum(real, axis=0), tl.sum(imaginary, axis=0)
