"""Kernels for the audit's own tests: one that is in order, and one for every way to fail."""

import triton
import triton.language as tl

from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.tiles import Tile


@triton.jit
def _scaled(x, factor):  # a helper that a declared kernel calls: needs no declaration
    return x * factor


@triton.jit(do_not_specialize=["length"])
def good_kernel(a, b, y, bias, length, HEAD_DIM: tl.constexpr, BLOCK_L: tl.constexpr):
    column = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, BLOCK_L)
    total = tl.zeros((BLOCK_L, HEAD_DIM), tl.float32)
    for start in range(0, length, BLOCK_L):
        offset = (start + row).to(tl.int64)[:, None] * HEAD_DIM + column[None, :]
        inside = (start + row < length)[:, None]
        left = tl.load(a + offset, mask=inside, other=0.0)
        right = tl.load(b + offset, mask=inside, other=0.0)
        scores = tl.dot(left, tl.trans(right), input_precision="ieee")
        total += tl.dot(scores.to(right.dtype), right, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column)[None, :]
    tl.store(y + row[:, None] * HEAD_DIM + column[None, :], _scaled(total, 0.5).to(y.dtype.element_ty))


@triton.jit
def spilling_kernel(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    values = tl.load(x + index).to(tl.float32)
    tl.store(y + index, (values * tl.sum(values, 0)).to(y.dtype.element_ty))  # every value is alive over the sum


@triton.jit
def broken_kernel(x, y, SIZE: tl.constexpr):
    tl.store(y + tl.arange(0, SIZE), tl.load(x + tl.arange(0, SIZE)).reshape(3))


@triton.jit
def unregistered_kernel(x, y):
    tl.store(y, tl.load(x))


_POINTERS = {"a": "*{dtype}", "b": "*{dtype}", "y": "*{dtype}", "bias": "*fp32", "length": "i64"}
KERNELS = [
    KernelSpec(
        name="sample.good",
        function=good_kernel,
        signature=_POINTERS,
        tiles=(Tile({"BLOCK_L": 64}, num_warps=4), Tile({"BLOCK_L": 128}, num_warps=8)),
        variants=({"HEAD_DIM": 64}, {"HEAD_DIM": 128, "bias": None}),
        dtypes=("bf16", "fp16"),
        matrix_units=("bf16", "fp16"),
    ),
    KernelSpec(
        name="sample.overrun",  # 128 x 256 operands, four stages deep
        function=good_kernel,
        signature=_POINTERS,
        tiles=(Tile({"BLOCK_L": 128}, num_warps=8, num_stages=4),),
        variants=({"HEAD_DIM": 256},),
        dtypes=("bf16",),
        matrix_units=("bf16",),
    ),
    KernelSpec(
        name="sample.idle",  # float32 products in full precision run on the ordinary units
        function=good_kernel,
        signature=_POINTERS,
        tiles=(Tile({"BLOCK_L": 32}, num_warps=4),),
        variants=({"HEAD_DIM": 32},),
        dtypes=("fp32",),
        matrix_units=("fp32",),
    ),
    KernelSpec(
        name="sample.spill",
        function=spilling_kernel,
        signature={"x": "*{dtype}", "y": "*{dtype}"},
        tiles=(Tile({"SIZE": 16384}, num_warps=1),),
        dtypes=("fp32",),
    ),
    KernelSpec(
        name="sample.broken",
        function=broken_kernel,
        signature={"x": "*{dtype}", "y": "*{dtype}"},
        tiles=(Tile({"SIZE": 64}),),
        dtypes=("fp32",),
    ),
]
