"""Tiles of the diagonal SSM on a GPU: streams of tokens, and the small matrices of every head.

A stream is a segment of one document. A program takes BLOCK_H heads of BLOCK_M streams and walks them in step,
BLOCK_Q tokens of each at a time: for one head that is a product of a (streams, tokens) matrix with the head's own.
Modes go in groups of BLOCK_N, each an SSM of its own whose outputs are added: a lane P of a program's products is
one head and group, P = BLOCK_H GROUPS. Tables are (heads, groups, ..., BLOCK_N), one for real and one for imaginary
parts; states (streams, heads, groups, 2, BLOCK_N).
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqmodels.ops.tiles import Device


def precision(device: Device) -> str:
    """Three TF32 products have float32's precision; AMD's matrix units take float32."""
    return "tf32x3" if device.backend == "cuda" else "ieee"


@triton.jit
def streams_of(starts, lengths, length, segment, segments, streams, MIRROR: tl.constexpr, BLOCK_M: tl.constexpr):
    """(number, flat index of the first token, tokens) of BLOCK_M streams; from the documents' ends if MIRROR."""
    stream = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = stream < streams
    document = stream // segments
    skipped = (stream - document * segments) * segment
    if starts is None:
        begin = document * length
        size = tl.zeros_like(document) + length
    else:
        begin = tl.load(starts + document, mask=used, other=0)
        size = tl.load(lengths + document, mask=used, other=0)
    count = tl.where(used, tl.minimum(tl.maximum(size - skipped, 0), segment), 0)
    token = begin + size - 1 - skipped if MIRROR else begin + skipped
    return stream, token, count.to(tl.int32)


@triton.jit
def token_offsets(position, head, stride, MIRROR: tl.constexpr):
    """(H, M, Q), from the address of each stream's first token, of the tokens at ``position``; fits 32 bits."""
    offset = (position * stride)[None, :, :]
    return head[:, None, None] - offset if MIRROR else head[:, None, None] + offset


@triton.jit
def spread(values, BLOCK_H: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(H, M, Q) for every group of modes: (P, M, Q)."""
    copies = tl.broadcast_to(values[:, None, :, :], (BLOCK_H, GROUPS, BLOCK_M, BLOCK_Q))
    return copies.reshape(BLOCK_H * GROUPS, BLOCK_M, BLOCK_Q)


@triton.jit
def table(pointer, lane, lanes, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """(P, Q, N) of a table (lanes, Q, N)."""
    at = (lane[:, None] * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :])[:, :, None] * BLOCK_N
    return tl.load(pointer + at + tl.arange(0, BLOCK_N)[None, None, :], mask=(lane < lanes)[:, None, None], other=0.0)


@triton.jit
def row(pointer, lane, lanes, BLOCK_N: tl.constexpr):
    """(P, 1, N) of a table (lanes, N)."""
    at = lane[:, None, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :]
    return tl.load(pointer + at, mask=(lane < lanes)[:, None, None], other=0.0)


@triton.jit
def first_state(pointer, lanes, width, BLOCK_M: tl.constexpr):
    """The first of the program's streams in (streams, lanes, width)."""
    return pointer + tl.program_id(1).to(tl.int64) * BLOCK_M * lanes * width


@triton.jit
def state_offsets(lane, lanes, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(P, M, N), from there: the first part of ``width`` numbers; 32 bits, since they are held for long."""
    at = (tl.arange(0, BLOCK_M)[None, :] * lanes + lane[:, None])[:, :, None] * width
    return at + tl.arange(0, BLOCK_N)[None, None, :]


@triton.jit
def power_offsets(time, lane, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """(P, M, N): row ``time`` (M,) of a table (lanes, Q, N)."""
    return (lane[:, None] * BLOCK_Q + time[None, :])[:, :, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :]


@triton.jit
def decayed(real, imaginary, decay_real, decay_imaginary, rest_real, rest_imaginary):
    """A state through a chunk's decay, given in two parts: float32 holds only the first digits of e^{Q z}, and the
    same rounding in every chunk would add up over a long sequence."""
    new_real = rest_real * real - rest_imaginary * imaginary
    new_imaginary = rest_real * imaginary + rest_imaginary * real
    new_real += decay_real * real - decay_imaginary * imaginary
    new_imaginary += decay_real * imaginary + decay_imaginary * real
    return new_real, new_imaginary
