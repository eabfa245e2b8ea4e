"""Sums over time of a diagonal SSM's states on a GPU: what the gradients to its constants are made of.

With x the state of one group of 16 modes, x' = dx/dz beside it, and g the gradient to an output,

    A = sum_t g[t] x[t],    A' = sum_t g[t] x'[t]

Inside a chunk both are sums over lags, of the products u[s] g[t] added over all chunks (:func:`lags`); between
chunks, with
E[s] = e^{(Q-1-s) z} and g turned round inside its chunk,

    A += (g E) before,   A' += (g E') before + (g E) before',
    before <- e^{Qz} before + u E,   before' <- e^{Qz} (before' + Q before) + u E'

where E' has its exponents as factors. Inputs have weight 1, and g reads a state behind its token one decay later: both
are left to the caller. Everything goes forward in time, and nothing of the forward pass is kept. Device memory sees u
and g once for the lags and once for each group: 8 bytes a token and head;
u once more, 4 bytes, for the states behind documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.diagonal_ssm.streams import Streams
from seqmodels.ops.diagonal_ssm.tables import MODES, SIZE
from seqmodels.ops.diagonal_ssm.triton_tiles import (
    decayed,
    first_state,
    power_offsets,
    precision,
    row,
    state_offsets,
    streams_of,
    table,
    token_offsets,
)
from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.tiles import Tile, device_properties


class SumTables(NamedTuple):
    """Of one group: inward, which is E, and powers (heads, 16, 16), decays (heads, 16)."""

    in_real: Tensor
    in_imaginary: Tensor
    decay_real: Tensor
    decay_imaginary: Tensor
    rest_real: Tensor
    rest_imaginary: Tensor
    power_real: Tensor
    power_imaginary: Tensor


@triton.jit(do_not_specialize=["length", "segment", "segments", "streams", "stride_u", "stride_g"])
def _sums(
    u, in_real, in_imaginary, decay_real, decay_imaginary, rest_real, rest_imaginary,
    power_real, power_imaginary, before, starts, lengths, g, sums, ends,
    length, segment, segments, streams, stride_u, stride_g, heads,
    MIRROR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """before, ends: (streams, heads, 4, N), x and x' with their parts; sums: (blocks of streams, heads, 4, N), the
    same of A and A' without lags."""
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    stream, token, count = streams_of(starts, lengths, length, segment, segments, streams, MIRROR, BLOCK_M)
    column = tl.arange(0, BLOCK_Q)
    known = (head < heads)[:, None, None]
    stored = known & (stream < streams)[None, :, None]
    x_real = tl.zeros([BLOCK_H, BLOCK_M, BLOCK_N], tl.float32)
    x_imaginary = tl.zeros([BLOCK_H, BLOCK_M, BLOCK_N], tl.float32)
    d_real = tl.zeros([BLOCK_H, BLOCK_M, BLOCK_N], tl.float32)
    d_imaginary = tl.zeros([BLOCK_H, BLOCK_M, BLOCK_N], tl.float32)
    state = state_offsets(head, heads, 4 * BLOCK_N, BLOCK_M, BLOCK_N)
    if before is not None:
        source = first_state(before, heads, 4 * BLOCK_N, BLOCK_M)
        x_real = tl.load(source + state, mask=stored, other=0.0)
        x_imaginary = tl.load(source + state + BLOCK_N, mask=stored, other=0.0)
        d_real = tl.load(source + state + 2 * BLOCK_N, mask=stored, other=0.0)
        d_imaginary = tl.load(source + state + 3 * BLOCK_N, mask=stored, other=0.0)
    b_real = table(in_real, head, heads, BLOCK_Q, BLOCK_N)
    b_imaginary = table(in_imaginary, head, heads, BLOCK_Q, BLOCK_N)
    a_real, a_imaginary = row(decay_real, head, heads, BLOCK_N), row(decay_imaginary, head, heads, BLOCK_N)
    e_real, e_imaginary = row(rest_real, head, heads, BLOCK_N), row(rest_imaginary, head, heads, BLOCK_N)
    if g is not None:
        sum_real = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        sum_imaginary = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        sum_d_real = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        sum_d_imaginary = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    older = (BLOCK_Q - 1 - column).to(tl.float32)[None, None, :]
    chunks = (tl.max(count, axis=0) + BLOCK_Q - 1) // BLOCK_Q
    for chunk in tl.range(0, chunks, disable_licm=True):  # split operands, hoisted, would not fit the registers
        position = chunk * BLOCK_Q + column[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
        inside = (position < count[:, None])[None, :, :] & known
        if g is not None:
            turned = chunk * BLOCK_Q + (BLOCK_Q - 1 - column)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
            g_at = (g + token * stride_g)[None, :, None] + token_offsets(turned, head, stride_g, MIRROR)
            grad = tl.load(g_at, mask=(turned < count[:, None])[None, :, :] & known, other=0.0)
            real = tl.dot(grad, b_real, input_precision=PRECISION)
            imaginary = tl.dot(grad, b_imaginary, input_precision=PRECISION)
            grad = grad * older
            real_d = tl.dot(grad, b_real, input_precision=PRECISION)
            imaginary_d = tl.dot(grad, b_imaginary, input_precision=PRECISION)
            # Added over streams at once: sums of (H, M, N) would not fit the registers.
            sum_real += tl.sum(real * x_real - imaginary * x_imaginary, axis=1)
            sum_imaginary += tl.sum(real * x_imaginary + imaginary * x_real, axis=1)
            part_real = real * d_real - imaginary * d_imaginary + real_d * x_real - imaginary_d * x_imaginary
            part_imaginary = real * d_imaginary + imaginary * d_real + real_d * x_imaginary + imaginary_d * x_real
            sum_d_real += tl.sum(part_real, axis=1)
            sum_d_imaginary += tl.sum(part_imaginary, axis=1)
        whole = ((chunk + 1) * BLOCK_Q <= count)[None, :, None]
        new_real, new_imaginary = decayed(
            d_real + BLOCK_Q * x_real, d_imaginary + BLOCK_Q * x_imaginary, a_real, a_imaginary, e_real, e_imaginary
        )
        if u is not None:
            u_at = (u + token * stride_u)[None, :, None] + token_offsets(position, head, stride_u, MIRROR)
            values = tl.load(u_at, mask=inside, other=0.0)
            weighted = values * older
            new_real = tl.dot(weighted, b_real, new_real, input_precision=PRECISION)
            new_imaginary = tl.dot(weighted, b_imaginary, new_imaginary, input_precision=PRECISION)
        d_real = tl.where(whole, new_real, d_real)
        d_imaginary = tl.where(whole, new_imaginary, d_imaginary)
        new_real, new_imaginary = decayed(x_real, x_imaginary, a_real, a_imaginary, e_real, e_imaginary)
        if u is not None:
            new_real = tl.dot(values, b_real, new_real, input_precision=PRECISION)
            new_imaginary = tl.dot(values, b_imaginary, new_imaginary, input_precision=PRECISION)
        x_real = tl.where(whole, new_real, x_real)
        x_imaginary = tl.where(whole, new_imaginary, x_imaginary)
    if g is not None:
        block = (tl.program_id(1) * heads + head).to(tl.int64)
        n = tl.arange(0, BLOCK_N)
        sink = sums + block[:, None] * (4 * BLOCK_N) + n[None, :]
        tl.store(sink, sum_real, mask=(head < heads)[:, None])
        tl.store(sink + BLOCK_N, sum_imaginary, mask=(head < heads)[:, None])
        tl.store(sink + 2 * BLOCK_N, sum_d_real, mask=(head < heads)[:, None])
        tl.store(sink + 3 * BLOCK_N, sum_d_imaginary, mask=(head < heads)[:, None])
    if ends is not None:
        left = count % BLOCK_Q
        time = power_offsets(left, head, BLOCK_Q, BLOCK_N)
        a_real = tl.load(power_real + time, mask=stored, other=0.0)
        a_imaginary = tl.load(power_imaginary + time, mask=stored, other=0.0)
        d_real += left.to(tl.float32)[None, :, None] * x_real
        d_imaginary += left.to(tl.float32)[None, :, None] * x_imaginary
        real = a_real * x_real - a_imaginary * x_imaginary
        imaginary = a_real * x_imaginary + a_imaginary * x_real
        new_real = a_real * d_real - a_imaginary * d_imaginary
        new_imaginary = a_real * d_imaginary + a_imaginary * d_real
        if u is not None:
            position = (count - BLOCK_Q)[:, None] + column[None, :]
            inside = (position >= (count - left)[:, None])[None, :, :] & known
            u_at = (u + token * stride_u)[None, :, None] + token_offsets(position, head, stride_u, MIRROR)
            values = tl.load(u_at, mask=inside, other=0.0)
            real = tl.dot(values, b_real, real, input_precision=PRECISION)
            imaginary = tl.dot(values, b_imaginary, imaginary, input_precision=PRECISION)
            values = values * older
            new_real = tl.dot(values, b_real, new_real, input_precision=PRECISION)
            new_imaginary = tl.dot(values, b_imaginary, new_imaginary, input_precision=PRECISION)
        end = first_state(ends, heads, 4 * BLOCK_N, BLOCK_M)
        tl.store(end + state, real, mask=stored)
        tl.store(end + state + BLOCK_N, imaginary, mask=stored)
        tl.store(end + state + 2 * BLOCK_N, new_real, mask=stored)
        tl.store(end + state + 3 * BLOCK_N, new_imaginary, mask=stored)


@triton.jit(do_not_specialize=["length", "segment", "segments", "streams", "stride_u", "stride_g"])
def _lags(
    u, starts, lengths, g, products, length, segment, segments, streams, stride_u, stride_g, heads,
    MIRROR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """products (blocks of streams, heads, Q, Q): u[s] g[t] at [s, t], over all chunks of a block."""
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    _, token, count = streams_of(starts, lengths, length, segment, segments, streams, MIRROR, BLOCK_M)
    column = tl.arange(0, BLOCK_Q)
    known = (head < heads)[:, None, None]
    pairs = tl.zeros([BLOCK_H, BLOCK_Q, BLOCK_Q], tl.float32)
    chunks = (tl.max(count, axis=0) + BLOCK_Q - 1) // BLOCK_Q
    for chunk in range(0, chunks):
        position = chunk * BLOCK_Q + column[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
        inside = (position < count[:, None])[None, :, :] & known
        u_at = (u + token * stride_u)[None, :, None] + token_offsets(position, head, stride_u, MIRROR)
        g_at = (g + token * stride_g)[None, :, None] + token_offsets(position, head, stride_g, MIRROR)
        values = tl.load(u_at, mask=inside, other=0.0)
        grad = tl.load(g_at, mask=inside, other=0.0)
        pairs = tl.dot(tl.permute(values, (0, 2, 1)), grad, pairs, input_precision=PRECISION)
    block = (tl.program_id(1) * heads + head).to(tl.int64)
    cell = (block[:, None] * BLOCK_Q + column[None, :])[:, :, None] * BLOCK_Q + column[None, None, :]
    tl.store(products + cell, pairs, mask=known)


_FLOATS = ("u", *SumTables._fields, "before", "g", "sums", "ends")
_SIZES = {
    **dict.fromkeys(("starts", "lengths"), "*i64"),
    **dict.fromkeys(("length", "segment", "segments", "streams"), "i64"),
    **dict.fromkeys(("stride_u", "stride_g", "heads"), "i32"),
}
_ROWS = {"starts": None, "lengths": None}
_BLOCK = {"BLOCK_H": 4, "BLOCK_M": 16, "BLOCK_Q": 16}


def _specs(suffix: str, rounding: str, backend: str) -> tuple[KernelSpec, KernelSpec]:
    plain = {"MIRROR": False, "PRECISION": rounding}
    sums = KernelSpec(
        name=f"diagonal_ssm.sums{suffix}",
        function=_sums,
        signature={**dict.fromkeys(_FLOATS, "*fp32"), **_SIZES},
        tiles=(Tile({**_BLOCK, "BLOCK_N": 16}, num_warps=4, num_stages=1),),
        variants=(
            {**plain, **_ROWS, "before": None, "ends": None},
            {**plain, "ends": None},
            {**plain, "MIRROR": True, "before": None, "ends": None},
            {**plain, "u": None, "ends": None},
            {**plain, "g": None, "sums": None},
            {**plain, **_ROWS, "before": None, "g": None, "sums": None},
            {**plain, "u": None, "g": None, "sums": None},
        ),
        dtypes=("fp32",),
        devices=lambda device: device.backend == backend,
    )
    lags = KernelSpec(
        name=f"diagonal_ssm.lags{suffix}",
        function=_lags,
        signature={**dict.fromkeys(("u", "g", "products"), "*fp32"), **_SIZES},
        tiles=(Tile(_BLOCK, num_warps=4, num_stages=1),),
        variants=({**plain, **_ROWS}, plain, {**plain, "MIRROR": True}),
        dtypes=("fp32",),
        devices=lambda device: device.backend == backend,
    )
    return sums, lags


SUMS, LAGS = _specs("", "tf32x3", "cuda")
SUMS_AMD, LAGS_AMD = _specs("_amd", "ieee", "hip")
KERNELS = [SUMS, LAGS, SUMS_AMD, LAGS_AMD]


def sums(
    u: Tensor | None, tables: SumTables, before: Tensor | None, streams: Streams, g: Tensor, *, mirror: bool
) -> Tensor:
    """(heads, 4, 16) over all tokens; without u only ``before`` is seen."""
    blocks = triton.cdiv(streams.count, _BLOCK["BLOCK_M"])
    found = g.new_empty((blocks, g.shape[2], 4, MODES))
    _launch(u, tables, before, streams, g, found, None, g.shape[2], mirror=mirror)
    return found.sum(0)


def ends(
    u: Tensor | None, tables: SumTables, before: Tensor | None, streams: Streams, like: Tensor, *, mirror: bool
) -> Tensor:
    """x and x' behind every stream: (documents, segments, heads, 4, 16), as ``like`` (batch, length, heads)."""
    found = like.new_empty((streams.documents, streams.segments, like.shape[2], 4, MODES))
    _launch(u, tables, before, streams, None, None, found, like.shape[2], mirror=mirror)
    return found


def _launch(
    u: Tensor | None,
    tables: SumTables,
    before: Tensor | None,
    streams: Streams,
    g: Tensor | None,
    found: Tensor | None,
    behind: Tensor | None,
    heads: int,
    *,
    mirror: bool,
) -> None:
    device = device_properties(tables.in_real.device.index)
    constants = {"MIRROR": mirror, "PRECISION": precision(device)}
    tile = (SUMS if device.backend == "cuda" else SUMS_AMD).tile(device, constants, "fp32")
    blocks = triton.cdiv(streams.count, tile.constants["BLOCK_M"])
    _sums[(triton.cdiv(heads, tile.constants["BLOCK_H"]), blocks)](
        u, *tables, before, streams.starts, streams.lengths, g, found, behind,
        streams.length, streams.segment, streams.segments, streams.count,
        0 if u is None else u.stride(1), 0 if g is None else g.stride(1), heads, **constants, **tile.launch(),
    )  # fmt: skip


def lags(u: Tensor, streams: Streams, g: Tensor, *, mirror: bool) -> Tensor:
    """(heads, 16) sums of u[s] g[s + lag] inside chunks, over all tokens."""
    heads = u.shape[2]
    device = device_properties(u.device.index)
    constants = {"MIRROR": mirror, "PRECISION": precision(device)}
    tile = (LAGS if device.backend == "cuda" else LAGS_AMD).tile(device, constants, "fp32")
    blocks = triton.cdiv(streams.count, tile.constants["BLOCK_M"])
    products = u.new_empty((blocks, heads, SIZE, SIZE))
    _lags[(triton.cdiv(heads, tile.constants["BLOCK_H"]), blocks)](
        u, streams.starts, streams.lengths, g, products, u.shape[1], streams.segment, streams.segments, streams.count,
        u.stride(1), g.stride(1), heads, **constants, **tile.launch(),
    )  # fmt: skip
    total = products.double().sum(0)
    return torch.stack([total.diagonal(lag, 1, 2).sum(-1) for lag in range(SIZE)], -1)
