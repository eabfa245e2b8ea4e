"""Outputs and last states of a diagonal SSM on a GPU, one or two groups of 16 modes at a time.

    y = [u, before] [T; C],   before <- e^{Qz} before + u B

with the matrices of :mod:`seqmodels.ops.diagonal_ssm.tables`. Device memory sees u and y once, 8 bytes a token and
head; matrices and states stay in registers. A warp holds one head's group, so that no product crosses warps; products
are in three TF32 parts, which is float32's precision, on AMD in float32 itself. The last tokens of a document, fewer
than a chunk, do not enter ``before``: they are put at the end of a chunk of their own, and e^{rest z} brings the state
there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.diagonal_ssm.streams import Streams
from seqmodels.ops.diagonal_ssm.tables import MODES, Tables
from seqmodels.ops.diagonal_ssm.triton_tiles import (
    decayed,
    first_state,
    power_offsets,
    precision,
    row,
    spread,
    state_offsets,
    streams_of,
    table,
    token_offsets,
)
from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit(do_not_specialize=["length", "segment", "segments", "streams", "stride_u", "stride_y"])
def _outputs(
    u, in_real, in_imaginary, out_real, out_imaginary, taps, decay_real, decay_imaginary, rest_real, rest_imaginary,
    power_real, power_imaginary, before, starts, lengths, y, ends,
    length, segment, segments, streams, stride_u, stride_y, heads,
    MIRROR: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """before, ends: (streams, heads, groups, 2, N), the state in front of every stream and behind it."""
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.program_id(0) * (BLOCK_H * GROUPS) + tl.arange(0, BLOCK_H * GROUPS)
    lanes = heads * GROUPS
    stream, token, count = streams_of(starts, lengths, length, segment, segments, streams, MIRROR, BLOCK_M)
    column = tl.arange(0, BLOCK_Q)
    known = (head < heads)[:, None, None]
    stored = (lane < lanes)[:, None, None] & (stream < streams)[None, :, None]
    b_real = table(in_real, lane, lanes, BLOCK_Q, BLOCK_N)
    b_imaginary = table(in_imaginary, lane, lanes, BLOCK_Q, BLOCK_N)
    a_real, a_imaginary = row(decay_real, lane, lanes, BLOCK_N), row(decay_imaginary, lane, lanes, BLOCK_N)
    e_real, e_imaginary = row(rest_real, lane, lanes, BLOCK_N), row(rest_imaginary, lane, lanes, BLOCK_N)
    real = tl.zeros([BLOCK_H * GROUPS, BLOCK_M, BLOCK_N], tl.float32)
    imaginary = tl.zeros([BLOCK_H * GROUPS, BLOCK_M, BLOCK_N], tl.float32)
    if before is not None:
        source = first_state(before, lanes, 2 * BLOCK_N, BLOCK_M)
        source += state_offsets(lane, lanes, 2 * BLOCK_N, BLOCK_M, BLOCK_N)
        real = tl.load(source, mask=stored, other=0.0)
        imaginary = tl.load(source + BLOCK_N, mask=stored, other=0.0)
    if y is not None:  # (P, N, Q), and (P, Q, Q) with the taps along its diagonals
        c_real = table(out_real, lane, lanes, BLOCK_N, BLOCK_Q)
        c_imaginary = table(out_imaginary, lane, lanes, BLOCK_N, BLOCK_Q)
        lag = (column[None, :] - column[:, None])[None, :, :]
        tap = taps + lane[:, None, None] * BLOCK_Q + lag
        toeplitz = tl.load(tap, mask=(lag >= 0) & (lane < lanes)[:, None, None], other=0.0)
    u_first = (u + token * stride_u)[None, :, None]
    chunks = (tl.max(count, axis=0) + BLOCK_Q - 1) // BLOCK_Q
    for chunk in range(0, chunks):
        position = chunk * BLOCK_Q + column[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
        inside = (position < count[:, None])[None, :, :] & known
        values = tl.load(u_first + token_offsets(position, head, stride_u, MIRROR), mask=inside, other=0.0)
        values = spread(values, BLOCK_H, GROUPS, BLOCK_M, BLOCK_Q)
        if y is not None:
            total = tl.dot(values, toeplitz, input_precision=PRECISION)
            total = tl.dot(real, c_real, total, input_precision=PRECISION)
            total = tl.dot(imaginary, c_imaginary, total, input_precision=PRECISION)
            total = tl.sum(total.reshape(BLOCK_H, GROUPS, BLOCK_M, BLOCK_Q), axis=1)
            target = (y + token * stride_y)[None, :, None] + token_offsets(position, head, stride_y, MIRROR)
            if ADD:
                total += tl.load(target, mask=inside, other=0.0)
            tl.store(target, total, mask=inside)
        new_real, new_imaginary = decayed(real, imaginary, a_real, a_imaginary, e_real, e_imaginary)
        new_real = tl.dot(values, b_real, new_real, input_precision=PRECISION)
        new_imaginary = tl.dot(values, b_imaginary, new_imaginary, input_precision=PRECISION)
        whole = ((chunk + 1) * BLOCK_Q <= count)[None, :, None]
        real = tl.where(whole, new_real, real)
        imaginary = tl.where(whole, new_imaginary, imaginary)
    left = count % BLOCK_Q
    position = (count - BLOCK_Q)[:, None] + column[None, :]
    inside = (position >= (count - left)[:, None])[None, :, :] & known
    values = tl.load(u_first + token_offsets(position, head, stride_u, MIRROR), mask=inside, other=0.0)
    values = spread(values, BLOCK_H, GROUPS, BLOCK_M, BLOCK_Q)
    time = power_offsets(left, lane, BLOCK_Q, BLOCK_N)
    a_real = tl.load(power_real + time, mask=stored, other=0.0)
    a_imaginary = tl.load(power_imaginary + time, mask=stored, other=0.0)
    kept_real = a_real * real - a_imaginary * imaginary
    kept_imaginary = a_real * imaginary + a_imaginary * real
    kept_real = tl.dot(values, b_real, kept_real, input_precision=PRECISION)
    kept_imaginary = tl.dot(values, b_imaginary, kept_imaginary, input_precision=PRECISION)
    end = first_state(ends, lanes, 2 * BLOCK_N, BLOCK_M) + state_offsets(lane, lanes, 2 * BLOCK_N, BLOCK_M, BLOCK_N)
    tl.store(end, kept_real, mask=stored)
    tl.store(end + BLOCK_N, kept_imaginary, mask=stored)


_FLOATS = ("u", *Tables._fields, "before", "y", "ends")
_SIZES = {
    **dict.fromkeys(("starts", "lengths"), "*i64"),
    **dict.fromkeys(("length", "segment", "segments", "streams"), "i64"),
    **dict.fromkeys(("stride_u", "stride_y", "heads"), "i32"),
}  # fmt: skip
_ROWS = {"starts": None, "lengths": None}


def _spec(name: str, rounding: str, backend: str) -> KernelSpec:
    plain = {"MIRROR": False, "ADD": False, "PRECISION": rounding, "GROUPS": 2}
    block = {"BLOCK_M": 16, "BLOCK_Q": 16, "BLOCK_N": 16}
    return KernelSpec(
        name=name,
        function=_outputs,
        signature={**dict.fromkeys(_FLOATS, "*fp32"), **_SIZES},
        tiles=(
            Tile({"BLOCK_H": 4, **block}, num_warps=8, num_stages=1),
            Tile({"BLOCK_H": 4, **block}, num_warps=4, num_stages=1),
        ),
        variants=(
            {**plain, **_ROWS, "before": None},
            {**plain, "ADD": True},
            {**plain, **_ROWS, "before": None, "y": None},
            {**plain, "MIRROR": True},
            {**plain, "GROUPS": 1},
        ),
        dtypes=("fp32",),
        valid=lambda tile, variant, dtype: tile.num_warps == 4 * variant["GROUPS"],  # a warp for each head's group
        devices=lambda device: device.backend == backend,
    )


OUTPUTS = _spec("diagonal_ssm.outputs", "tf32x3", "cuda")
OUTPUTS_AMD = _spec("diagonal_ssm.outputs_amd", "ieee", "hip")
KERNELS = [OUTPUTS, OUTPUTS_AMD]


def outputs(
    u: Tensor,
    tables: Tables,
    before: Tensor | None,
    streams: Streams,
    y: Tensor | None,
    *,
    mirror: bool,
    add: bool = False,
) -> Tensor:
    """Writes y, of u's shape with heads next to each other in memory, where given (``add``: to what is in it). The
    states behind all streams: (documents, segments, heads, groups, 2, 16)."""
    heads, groups = tables.taps.shape[:2]
    ends = u.new_empty((streams.documents, streams.segments, heads, groups, 2, MODES))
    device = device_properties(u.device.index)
    constants = {"MIRROR": mirror, "ADD": add, "PRECISION": precision(device), "GROUPS": groups}
    tile = (OUTPUTS if device.backend == "cuda" else OUTPUTS_AMD).tile(device, constants, "fp32")
    grid = (triton.cdiv(heads, tile.constants["BLOCK_H"]), triton.cdiv(streams.count, tile.constants["BLOCK_M"]))
    _outputs[grid](
        u, *tables, before, streams.starts, streams.lengths, y, ends,
        u.shape[1], streams.segment, streams.segments, streams.count,
        u.stride(1), 0 if y is None else y.stride(1), heads, **constants, **tile.launch(),
    )  # fmt: skip
    return ends
