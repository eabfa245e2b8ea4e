"""Segments of the linear recurrence on a GPU: the affine map of each, so that all of them can run at once.

A segment of tokens is the map h -> P h + E: P the product of its decays, E its last state from zero. One pass makes
(P, E) of every segment; the recurrence over segments, itself a linear recurrence of ``count`` steps, gives the state
behind each; then every segment runs with the state before it. The gradient does the same from the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.linear_recurrence.segments import plan as plan  # what triton.py cuts by
from seqmodels.ops.linear_recurrence.triton_tiles import apply, backward_maps, forward_maps, pick, store_rows
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _composed(pr, pi, ar, ai, COMPLEX: tl.constexpr):
    """The product of decays so far, and of one more tile."""
    if COMPLEX:
        real = ar * pr - ai * pi
        imaginary = ar * pi + ai * pr
    else:
        real = ar * pr
        imaginary = real
    return real, imaginary


@triton.jit(do_not_specialize=["length", "segment"])
def _ends(
    decay, x, initial_state, document, flags, products, ends, length, segment, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C
    start = (tl.program_id(2) * segment).to(tl.int32)  # columns fit 32 bits, and are held by every thread
    end = tl.minimum(start + segment, length).to(tl.int32)
    step = tl.arange(0, BLOCK_L)
    product_real = tl.zeros([BLOCK_C], tl.float32) + 1.0
    product_imaginary = tl.zeros([BLOCK_C], tl.float32)
    real = tl.zeros([BLOCK_C], tl.float32)
    imaginary = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(start, end, BLOCK_L):
        t = begin + step
        ar, ai, br, bi = forward_maps(
            decay, x, initial_state, document, flags, row, t, t < end, c, length, channels,
            VARYING, COMPLEX, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        hr, hi = apply(ar, ai, br, bi, real, imaginary, COMPLEX)
        last = step == BLOCK_L - 1
        real = pick(hr, last)
        imaginary = pick(hi, last)
        product_real, product_imaginary = _composed(
            product_real, product_imaginary, pick(ar, last), pick(ai, last), COMPLEX
        )
    one = tl.zeros([1], tl.int64) + row * tl.num_programs(2) + tl.program_id(2)
    store_rows(
        products, one, one >= 0, c, channels, product_real[None, :], product_imaginary[None, :], COMPLEX, 1, BLOCK_C
    )
    store_rows(ends, one, one >= 0, c, channels, real[None, :], imaginary[None, :], COMPLEX, 1, BLOCK_C)


@triton.jit(do_not_specialize=["length", "segment"])
def _gradient_ends(
    decay, document, flags, grad_h, grad_final, products, ends, length, segment, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C
    start = (tl.program_id(2) * segment).to(tl.int32)  # columns fit 32 bits, and are held by every thread
    end = tl.minimum(start + segment, length).to(tl.int32)
    step = tl.arange(0, BLOCK_L)
    product_real = tl.zeros([BLOCK_C], tl.float32) + 1.0
    product_imaginary = tl.zeros([BLOCK_C], tl.float32)
    real = tl.zeros([BLOCK_C], tl.float32)
    imaginary = tl.zeros([BLOCK_C], tl.float32)
    for done in range(0, end - start, BLOCK_L):
        t = end - done - BLOCK_L + step
        ar, ai, er, ei = backward_maps(
            decay, document, flags, grad_h, grad_final, row, t, t >= start, c, length, channels,
            VARYING, COMPLEX, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        gr, gi = apply(ar, ai, er, ei, real, imaginary, COMPLEX)
        real = pick(gr, step == 0)
        imaginary = pick(gi, step == 0)
        product_real, product_imaginary = _composed(
            product_real, product_imaginary, pick(ar, step == 0), pick(ai, step == 0), COMPLEX
        )
    one = tl.zeros([1], tl.int64) + row * tl.num_programs(2) + tl.program_id(2)
    store_rows(
        products, one, one >= 0, c, channels, product_real[None, :], product_imaginary[None, :], COMPLEX, 1, BLOCK_C
    )
    store_rows(ends, one, one >= 0, c, channels, real[None, :], imaginary[None, :], COMPLEX, 1, BLOCK_C)


_RESULTS = dict.fromkeys(("decay", "products", "ends"), "*fp32")
_SIZES = {"document": "*i64", "flags": "*u8", "length": "i64", "segment": "i64", "channels": "i32"}
_ALONE = {"document": None, "flags": None}
_TILES = (
    Tile({"BLOCK_L": 32, "BLOCK_C": 16}, num_warps=4, num_stages=1),
    Tile({"BLOCK_L": 32, "BLOCK_C": 32}, num_warps=8, num_stages=1),
)
_KINDS = tuple({"VARYING": varying, "COMPLEX": numbers} for varying in (False, True) for numbers in (True, False))
ENDS = KernelSpec(
    name="linear_recurrence.ends",
    function=_ends,
    signature={**_RESULTS, **_SIZES, "x": "*fp32", "initial_state": "*fp32"},
    tiles=_TILES,
    variants=(*_KINDS, {**_KINDS[0], "initial_state": None, **_ALONE}, {**_KINDS[2], "initial_state": None, **_ALONE}),
    dtypes=("fp32",),
    divisible=("channels",),
)
GRADIENT_ENDS = KernelSpec(
    name="linear_recurrence.gradient_ends",
    function=_gradient_ends,
    signature={**_RESULTS, **_SIZES, "grad_h": "*fp32", "grad_final": "*fp32"},
    tiles=_TILES,
    variants=(*_KINDS, {**_KINDS[0], **_ALONE}, {**_KINDS[2], **_ALONE}),
    dtypes=("fp32",),
    divisible=("channels",),
)
KERNELS = [ENDS, GRADIENT_ENDS]


def _launch(
    spec: KernelSpec, kernel: triton.JITFunction, decay: Tensor, like: Tensor, tensors: tuple[Tensor | None, ...],
    segment: int, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, channels = like.shape[:3]
    constants = {"VARYING": decay.dim() == like.dim(), "COMPLEX": like.dim() == 4}
    tile = spec.tile(device_properties(like.device.index), constants, "fp32")
    products, ends = (like.new_empty((batch, count, *like.shape[2:])) for _ in range(2))
    grid = (batch, triton.cdiv(channels, tile.constants["BLOCK_C"]), count)
    kernel[grid](decay, *tensors, products, ends, length, segment, channels, **constants, **tile.launch())
    return products, ends


def ends(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    document: Tensor | None,
    flags: Tensor | None,
    segment: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """(P, E) of every segment, both (batch, count, channels[, 2])."""
    return _launch(ENDS, _ends, decay, x, (x, initial_state, document, flags), segment, count)


def starts_of_gradient(
    decay: Tensor,
    document: Tensor | None,
    flags: Tensor | None,
    grad_h: Tensor,
    grad_final: Tensor,
    segment: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The same from the end: g at a segment's first token is P g(first token of the next) + E."""
    tensors = (document, flags, grad_h, grad_final)
    return _launch(GRADIENT_ENDS, _gradient_ends, decay, grad_h, tensors, segment, count)
