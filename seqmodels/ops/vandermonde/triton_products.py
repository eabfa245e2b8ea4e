"""Vandermonde products on a GPU.

    kernel[r, h, l] = scale Re sum_n weight[r, h, n] e^{l z[h, n]}
    S0[r, h, n] = sum_l g[r, h, l] e^{l z[h, n]},   S1 the same with a factor l

Tiling: a tile of BLOCK_A x BLOCK_B times has l = start + a BLOCK_B + b, so that its powers are products
of BLOCK_A + BLOCK_B ones, and the sum over states (kernel) or over b (moments) is a product of small
matrices. Powers are formed where they are used and never stored. Their phase is reduced in turns:
l Im z / 2 pi in float64, less its integer part, then float32; l Re z is rounded to float32 as it is.

The kernel has one program for each row, head and tile; moments have one for each row, head and block of
states, which walks all times: sums have one order, nothing is atomic. Products are in full float32 ("ieee"):
they are a small part of the layer's work, and the convolution kernel's error is the layer's.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _power(time, rate, turns):
    """e^{time (rate + 2 pi i turns)} of float64 arguments, as float32 (real, imaginary).

    The phase is reduced to an eighth of a turn either way, where Taylor polynomials suffice: the library's
    sine keeps a table in local memory for the large arguments that cannot come here.
    """
    phase = time * turns
    quarters = tl.floor(4.0 * phase + 0.5)
    x = (phase - 0.25 * quarters).to(tl.float32) * 6.283185307179586
    y = x * x
    cosine = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 - y / 3628800))))
    sine = x * (1.0 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880))))
    quadrant = quarters.to(tl.int64) & 3
    odd = (quadrant & 1) != 0
    size = tl.exp((time * rate).to(tl.float32))
    real = tl.where(odd, sine, cosine) * tl.where((quadrant == 1) | (quadrant == 2), -size, size)
    imaginary = tl.where(odd, cosine, sine) * tl.where(quadrant >= 2, -size, size)
    return real, imaginary


@triton.jit(do_not_specialize=["length"])
def _kernel(
    rate, turns, weight, out, length, heads, states, scale,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_head = tl.program_id(0).to(tl.int64)
    head = row_head % heads
    start = tl.program_id(1).to(tl.int64) * (BLOCK_A * BLOCK_B)
    outer = (start + tl.arange(0, BLOCK_A) * BLOCK_B).to(tl.float64)
    inner = tl.arange(0, BLOCK_B).to(tl.float64)
    total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for begin in range(0, states, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        used = n < states
        r = tl.load(rate + head * states + n, mask=used, other=0.0)
        f = tl.load(turns + head * states + n, mask=used, other=0.0)
        at = (row_head * states + n) * 2
        w_real = tl.load(weight + at, mask=used, other=0.0)[None, :]
        w_imaginary = tl.load(weight + at + 1, mask=used, other=0.0)[None, :]
        real, imaginary = _power(outer[:, None], r[None, :], f[None, :])
        left_real = w_real * real - w_imaginary * imaginary
        left_imaginary = w_real * imaginary + w_imaginary * real
        real, imaginary = _power(inner[None, :], r[:, None], f[:, None])
        total = tl.dot(left_real, real, total, input_precision="ieee")
        total = tl.dot(-left_imaginary, imaginary, total, input_precision="ieee")
    time = start + tl.arange(0, BLOCK_A)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    tl.store(out + row_head * length + time, scale * total, mask=time < length)


@triton.jit(do_not_specialize=["length"])
def _moments(
    rate, turns, g, zeroth, first, length, heads, states,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_head = tl.program_id(0).to(tl.int64)
    head = row_head % heads
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = n < states
    r = tl.load(rate + head * states + n, mask=used, other=0.0)
    f = tl.load(turns + head * states + n, mask=used, other=0.0)
    b = tl.arange(0, BLOCK_B)
    inner_real, inner_imaginary = _power(b.to(tl.float64)[:, None], r[None, :], f[None, :])
    step = tl.arange(0, BLOCK_A) * BLOCK_B
    zeroth_real = tl.zeros([BLOCK_N], tl.float32)
    zeroth_imaginary = tl.zeros([BLOCK_N], tl.float32)
    first_real = tl.zeros([BLOCK_N], tl.float32)
    first_imaginary = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, length, BLOCK_A * BLOCK_B):
        begins = (start + step).to(tl.int64)
        time = begins[:, None] + b[None, :]
        values = tl.load(g + row_head * length + time, mask=time < length, other=0.0)
        real, imaginary = _power(begins.to(tl.float64)[:, None], r[None, :], f[None, :])
        part_real = tl.dot(values, inner_real, input_precision="ieee")
        part_imaginary = tl.dot(values, inner_imaginary, input_precision="ieee")
        zeroth_real += tl.sum(real * part_real - imaginary * part_imaginary, axis=0)
        zeroth_imaginary += tl.sum(real * part_imaginary + imaginary * part_real, axis=0)
        if first is not None:
            weighted = values * b.to(tl.float32)[None, :]
            offset = begins.to(tl.float32)[:, None]
            part_real = tl.dot(weighted, inner_real, offset * part_real, input_precision="ieee")
            part_imaginary = tl.dot(weighted, inner_imaginary, offset * part_imaginary, input_precision="ieee")
            first_real += tl.sum(real * part_real - imaginary * part_imaginary, axis=0)
            first_imaginary += tl.sum(real * part_imaginary + imaginary * part_real, axis=0)
    at = (row_head * states + n) * 2
    tl.store(zeroth + at, zeroth_real, mask=used)
    tl.store(zeroth + at + 1, zeroth_imaginary, mask=used)
    if first is not None:
        tl.store(first + at, first_real, mask=used)
        tl.store(first + at + 1, first_imaginary, mask=used)


_EXPONENTS = {"rate": "*fp64", "turns": "*fp64"}
_SIZES = {"length": "i64", "heads": "i32", "states": "i32"}
KERNEL = KernelSpec(
    name="vandermonde.kernel",
    function=_kernel,
    signature={**_EXPONENTS, "weight": "*fp32", "out": "*fp32", **_SIZES, "scale": "fp32"},
    tiles=(
        Tile({"BLOCK_A": 32, "BLOCK_B": 64, "BLOCK_N": 32}, num_warps=4, num_stages=1),
        Tile({"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1),
    ),
    dtypes=("fp32",),
)
MOMENTS = KernelSpec(
    name="vandermonde.moments",
    function=_moments,
    signature={**_EXPONENTS, "g": "*fp32", "zeroth": "*fp32", "first": "*fp32", **_SIZES},
    tiles=(
        Tile({"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1),
        Tile({"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_N": 16}, num_warps=4, num_stages=1),
    ),
    variants=({}, {"first": None}),
    dtypes=("fp32",),
)
KERNELS = [KERNEL, MOMENTS]


def refusal(values: Tensor) -> str | None:
    return None if values.dtype == torch.float32 else f"the Triton kernels take float32; the values are {values.dtype}"


def _exponents(z: Tensor) -> tuple[Tensor, Tensor]:
    exact = z.double()
    return exact[..., 0].contiguous(), (exact[..., 1] / (2 * math.pi)).contiguous()


def kernel(z: Tensor, weight: Tensor, length: int, scale: float) -> Tensor:
    rows, heads, states, _ = weight.shape
    out = weight.new_empty((rows, heads, length))
    tile = KERNEL.tile(device_properties(z.device.index), {}, "fp32")
    grid = (rows * heads, triton.cdiv(length, tile.constants["BLOCK_A"] * tile.constants["BLOCK_B"]))
    _kernel[grid](*_exponents(z), weight.contiguous(), out, length, heads, states, scale, **tile.launch())
    return out


def moments(z: Tensor, g: Tensor, *, first: bool = True) -> tuple[Tensor, Tensor]:
    rows, heads, length = g.shape
    states = z.shape[1]
    zeroth = g.new_empty((rows, heads, states, 2))
    other = torch.empty_like(zeroth) if first else None
    tile = MOMENTS.tile(device_properties(z.device.index), {} if first else {"first": None}, "fp32")
    grid = (rows * heads, triton.cdiv(states, tile.constants["BLOCK_N"]))
    _moments[grid](*_exponents(z), g.contiguous(), zeroth, other, length, heads, states, **tile.launch())
    return zeroth, zeroth.new_empty(0) if other is None else other
