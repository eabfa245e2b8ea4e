"""Short convolution on a GPU.

    z[t] = bias + sum_w weight[w] u[t - (W-1) + w],   y = z or z sigmoid(z)

Tiling: a program owns BLOCK_L tokens of the flattened (batch x length) grid times BLOCK_C
channels. It finds each token's document by dividing by the length, or by a binary search in
``starts``; a tap that would leave the document reads the initial state instead, or zero. The
W taps of a tile overlap, so all but the first come from the first-level cache: device memory
sees x once and y once.

The backward recomputes z where it needs it (W of them a token with SiLU) instead of storing
it: it moves x, grad_y and grad_x only. Weight gradients are one partial sum a tile, added
afterwards in a fixed order: no atomics. The states, W-1 rows a document, have small kernels
of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Device, Tile, device_properties


@triton.jit
def _documents(flat, starts, lengths, documents, search_steps, length, tokens):
    """(slot, first token, size, inside) of the document of every flat token index."""
    if starts is None:
        slot = flat // length
        first = slot * length
        size = tl.zeros_like(flat) + length
        inside = flat < tokens
    else:
        low = tl.zeros_like(flat)
        high = tl.zeros_like(flat) + documents
        for _ in range(search_steps):
            middle = (low + high) // 2
            searching = low < high
            before = searching & (tl.load(starts + middle, mask=searching, other=0) <= flat)
            low = tl.where(before, middle + 1, low)
            high = tl.where(before, high, middle)
        slot = tl.maximum(low - 1, 0)
        first = tl.load(starts + slot)
        size = tl.load(lengths + slot)
        inside = (flat >= first) & (flat < first + size)
    return slot, first, size, inside


@triton.jit
def _input(x, x_stride, initial_state, channels, token, slot, first, inside, c, in_channels, WIDTH: tl.constexpr):
    """u at flat index ``token``, float32: x from ``first`` on, before it the document's state."""
    in_x = inside & (token >= first)
    u = tl.load(x + token[:, None] * x_stride + c[None, :], mask=in_x[:, None] & in_channels[None, :], other=0.0)
    u = u.to(tl.float32)
    if initial_state is not None:
        row = slot * (WIDTH - 1) + (WIDTH - 1) + token - first
        in_state = (inside & (token < first))[:, None] & in_channels[None, :]
        u += tl.load(initial_state + row[:, None] * channels + c[None, :], mask=in_state, other=0.0)
    return u


@triton.jit
def _preactivation(
    x, x_stride, weight, bias, initial_state, channels, token, slot, first, inside, c, in_channels,
    WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """z at flat index ``token``, float32."""
    z = tl.zeros([token.shape[0], c.shape[0]], tl.float32)
    for w in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
        tap = tl.load(weight + c * WIDTH + w, mask=in_channels, other=0.0).to(tl.float32)
        lagged = token - (WIDTH - 1) + w
        z += tap * _input(x, x_stride, initial_state, channels, lagged, slot, first, inside, c, in_channels, WIDTH)
    if bias is not None:
        z += tl.load(bias + c, mask=in_channels, other=0.0).to(tl.float32)
    return z


@triton.jit
def _grad_preactivation(
    grad_y, grad_stride, x, x_stride, weight, bias, initial_state, channels, token, slot, first, inside, c,
    in_channels, WIDTH: tl.constexpr, SILU: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dL/dz at flat index ``token``, float32, zero where not ``inside``."""
    in_tile = inside[:, None] & in_channels[None, :]
    grad = tl.load(grad_y + token[:, None] * grad_stride + c[None, :], mask=in_tile, other=0.0).to(tl.float32)
    if SILU:
        z = _preactivation(
            x, x_stride, weight, bias, initial_state, channels, token, slot, first, inside, c, in_channels,
            WIDTH, UNROLL,
        )  # fmt: skip
        gate = tl.sigmoid(z)
        grad *= gate * (1.0 + z * (1.0 - gate))
    return grad


@triton.jit(do_not_specialize=["documents", "search_steps", "length", "tokens"])
def _forward(
    x, x_stride, weight, bias, initial_state, y, starts, lengths, documents, search_steps, length, tokens, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    slot, first, _, inside = _documents(flat, starts, lengths, documents, search_steps, length, tokens)
    z = _preactivation(
        x, x_stride, weight, bias, initial_state, channels, flat, slot, first, inside, c, in_channels, WIDTH, UNROLL
    )
    if SILU:
        z *= tl.sigmoid(z)
    z = tl.where(inside[:, None], z, 0.0)  # padding
    in_grid = (flat < tokens)[:, None] & in_channels[None, :]
    tl.store(y + flat[:, None] * channels + c[None, :], z, mask=in_grid)


@triton.jit(do_not_specialize=["documents", "search_steps", "length", "tokens"])
def _backward(
    grad_y, grad_stride, grad_final_state, x, x_stride, weight, bias, initial_state, grad_x, partial, starts, lengths,
    documents, search_steps, length, tokens, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x of a tile, and its share of the weight gradient: partial (tiles, W + 1, channels), bias last."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    slot, first, size, inside = _documents(flat, starts, lengths, documents, search_steps, length, tokens)
    inside &= flat < tokens

    grad = _grad_preactivation(
        grad_y, grad_stride, x, x_stride, weight, bias, initial_state, channels, flat, slot, first, inside, c,
        in_channels, WIDTH, SILU, UNROLL,
    )  # fmt: skip
    out = partial + tl.program_id(0).to(tl.int64) * (WIDTH + 1) * channels + c
    for w in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
        lagged = flat - (WIDTH - 1) + w
        u = _input(x, x_stride, initial_state, channels, lagged, slot, first, inside, c, in_channels, WIDTH)
        tl.store(out + w * channels, tl.sum(grad * u, axis=0), mask=in_channels)
    tl.store(out + WIDTH * channels, tl.sum(grad, axis=0), mask=in_channels)

    # x[t] is tap W-1-lag of z[t + lag].
    total = grad * tl.load(weight + c * WIDTH + WIDTH - 1, mask=in_channels, other=0.0).to(tl.float32)
    for lag in tl.range(1, WIDTH, loop_unroll_factor=UNROLL):
        later = flat + lag
        grad = _grad_preactivation(
            grad_y, grad_stride, x, x_stride, weight, bias, initial_state, channels, later, slot, first,
            inside & (later < first + size), c, in_channels, WIDTH, SILU, UNROLL,
        )  # fmt: skip
        total += grad * tl.load(weight + c * WIDTH + WIDTH - 1 - lag, mask=in_channels, other=0.0).to(tl.float32)
    # The last W-1 tokens of a document are its final state.
    row = flat - (first + size - (WIDTH - 1))
    in_state = (inside & (row >= 0))[:, None] & in_channels[None, :]
    row += slot * (WIDTH - 1)
    total += tl.load(grad_final_state + row[:, None] * channels + c[None, :], mask=in_state, other=0.0)
    in_grid = (flat < tokens)[:, None] & in_channels[None, :]
    tl.store(grad_x + flat[:, None] * channels + c[None, :], total, mask=in_grid)


@triton.jit(do_not_specialize=["length"])
def _final_state(
    x, x_stride, initial_state, final_state, starts, lengths, length, channels,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Row j: input size - (W-1) + j of the document, or row size + j of its initial state."""
    slot = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    if starts is None:
        first = slot * length
        size = tl.zeros_like(slot) + length
    else:
        first = tl.load(starts + slot)
        size = tl.load(lengths + slot)
    for j in range(WIDTH - 1):
        t = size - (WIDTH - 1) + j
        value = tl.load(x + (first + t) * x_stride + c, mask=in_channels & (t >= 0), other=0.0).to(tl.float32)
        if initial_state is not None:
            row = slot * (WIDTH - 1) + size + j
            value += tl.load(initial_state + row * channels + c, mask=in_channels & (t < 0), other=0.0)
        tl.store(final_state + (slot * (WIDTH - 1) + j) * channels + c, value, mask=in_channels)


@triton.jit(do_not_specialize=["length"])
def _grad_initial_state(
    grad_y, grad_stride, grad_final_state, x, x_stride, weight, bias, initial_state, grad_initial_state, starts,
    lengths, length, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Row j is tap j - p of z[p] for p <= j, and row j - size of the final state. ROWS >= W-1."""
    slot = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    if starts is None:
        first = slot * length
        size = tl.zeros_like(slot) + length
    else:
        first = tl.load(starts + slot)
        size = tl.load(lengths + slot)
    p = tl.arange(0, ROWS)
    inside = (p < size) & (p < WIDTH - 1)
    zero = tl.zeros([ROWS], tl.int64)
    grad = _grad_preactivation(
        grad_y, grad_stride, x, x_stride, weight, bias, initial_state, channels, first + p, zero + slot, zero + first,
        inside, c, in_channels, WIDTH, SILU, UNROLL,
    )  # fmt: skip
    for j in range(WIDTH - 1):
        mask = (p <= j)[:, None] & in_channels[None, :]
        taps = tl.load(weight + c[None, :] * WIDTH + (j - p)[:, None], mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(grad * taps, axis=0)
        row = slot * (WIDTH - 1) + j
        total += tl.load(grad_final_state + (row - size) * channels + c, mask=in_channels & (j >= size), other=0.0)
        tl.store(grad_initial_state + row * channels + c, total, mask=in_channels)


_LAYOUT = {"starts": "*i64", "lengths": "*i64"}
_GRID = {**_LAYOUT, "documents": "i64", "search_steps": "i32", "length": "i64", "tokens": "i64", "channels": "i32"}
_WEIGHTS = {"weight": "*fp32", "bias": "*fp32", "initial_state": "*fp32"}
_PLAIN = {"bias": None, "initial_state": None, "starts": None, "lengths": None}
# The usual widths, with and without state and documents, and one width that is not unrolled.
_VARIANTS = (
    {"WIDTH": 4, "SILU": True, "UNROLL": 4, "initial_state": None, "starts": None, "lengths": None},
    {"WIDTH": 4, "SILU": True, "UNROLL": 4},
    {"WIDTH": 3, "SILU": True, "UNROLL": 4, **_PLAIN},
    {"WIDTH": 7, "SILU": False, "UNROLL": 1},
)
_WIDE = Tile({"BLOCK_L": 16, "BLOCK_C": 128}, num_warps=4, num_stages=1)
_NARROW = Tile({"BLOCK_L": 16, "BLOCK_C": 64}, num_warps=4, num_stages=1)


def _choose_forward(device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
    """Wide rows of channels; in float32 on sm_80 they would cost two spilled registers."""
    return _NARROW if dtype == "fp32" and device.target == "sm_80" else _WIDE


FORWARD = KernelSpec(
    name="short_conv.forward",
    function=_forward,
    signature={"x": "*{dtype}", "x_stride": "i64", **_WEIGHTS, "y": "*{dtype}", **_GRID},
    tiles=(_WIDE, _NARROW),
    variants=_VARIANTS,
    divisible=("x_stride", "channels"),
    choose=_choose_forward,
)
BACKWARD = KernelSpec(
    name="short_conv.backward",
    function=_backward,
    signature={
        "grad_y": "*{dtype}", "grad_stride": "i64", "grad_final_state": "*fp32", "x": "*{dtype}", "x_stride": "i64",
        **_WEIGHTS, "grad_x": "*{dtype}", "partial": "*fp32", **_GRID,
    },
    tiles=(
        Tile({"BLOCK_L": 16, "BLOCK_C": 64}, num_warps=4, num_stages=1),
        Tile({"BLOCK_L": 32, "BLOCK_C": 64}, num_warps=4, num_stages=1),
    ),
    variants=_VARIANTS,
    divisible=("x_stride", "grad_stride", "channels"),
)
FINAL_STATE = KernelSpec(
    name="short_conv.final_state",
    function=_final_state,
    signature={
        "x": "*{dtype}", "x_stride": "i64", "initial_state": "*fp32", "final_state": "*fp32", **_LAYOUT,
        "length": "i64", "channels": "i32",
    },
    tiles=(Tile({"BLOCK_C": 256}, num_warps=4, num_stages=1),),
    variants=({"WIDTH": 4, "initial_state": None, "starts": None, "lengths": None}, {"WIDTH": 4}),
    divisible=("x_stride", "channels"),
)
GRAD_INITIAL_STATE = KernelSpec(
    name="short_conv.grad_initial_state",
    function=_grad_initial_state,
    signature={
        "grad_y": "*{dtype}", "grad_stride": "i64", "grad_final_state": "*fp32", "x": "*{dtype}", "x_stride": "i64",
        **_WEIGHTS, "grad_initial_state": "*fp32", **_LAYOUT, "length": "i64", "channels": "i32",
    },
    tiles=(Tile({"BLOCK_C": 64}, num_warps=4, num_stages=1),),
    variants=(
        {"WIDTH": 4, "SILU": True, "UNROLL": 4, "ROWS": 4},
        {"WIDTH": 4, "SILU": True, "UNROLL": 4, "ROWS": 4, "starts": None, "lengths": None},
    ),
    divisible=("x_stride", "grad_stride", "channels"),
)
KERNELS = [FORWARD, BACKWARD, FINAL_STATE, GRAD_INITIAL_STATE]


def supports(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    return "the Triton kernels take float32, bfloat16 and float16, not float64" if x.dtype == torch.float64 else None


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows of dense channels at one stride from token to token over the whole grid."""
    if x.stride(-1) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1) if x.shape[0] * x.shape[1] > 1 else x.shape[2]


def _unroll(width: int) -> int:
    return 4 if width <= 4 else 1


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    batch_size, length, channels = x.shape
    width, tokens = weight.shape[1], batch_size * length
    documents = batch_size if starts is None else starts.shape[0]
    x, x_stride = _rows(x)
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty((documents, width - 1, channels), dtype=torch.float32)
    device = device_properties(x.device.index)
    constants = {"WIDTH": width, "SILU": silu, "UNROLL": _unroll(width)}
    tile = FORWARD.tile(device, constants, dtype_name(x.dtype))
    grid = (triton.cdiv(tokens, tile.constants["BLOCK_L"]), triton.cdiv(channels, tile.constants["BLOCK_C"]))
    _forward[grid](
        x, x_stride, weight, bias, initial_state, y, starts, lengths, documents, documents.bit_length(), length,
        tokens, channels, **constants, **tile.launch(),
    )  # fmt: skip
    if width > 1:
        tile = FINAL_STATE.tile(device, {"WIDTH": width}, dtype_name(x.dtype))
        _final_state[documents, triton.cdiv(channels, tile.constants["BLOCK_C"])](
            x, x_stride, initial_state, final_state, starts, lengths, length, channels, WIDTH=width, **tile.launch()
        )
    return y, final_state


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size, length, channels = x.shape
    width, tokens = weight.shape[1], batch_size * length
    documents = batch_size if starts is None else starts.shape[0]
    x, x_stride = _rows(x)
    grad_y, grad_stride = _rows(grad_y)
    grad_final_state = grad_final_state.contiguous()
    weight_float, bias_float = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    device = device_properties(x.device.index)
    constants = {"WIDTH": width, "SILU": silu, "UNROLL": _unroll(width)}
    tile = BACKWARD.tile(device, constants, dtype_name(x.dtype))
    grid = (triton.cdiv(tokens, tile.constants["BLOCK_L"]), triton.cdiv(channels, tile.constants["BLOCK_C"]))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial = x.new_empty((grid[0], width + 1, channels), dtype=torch.float32)
    _backward[grid](
        grad_y, grad_stride, grad_final_state, x, x_stride, weight_float, bias_float, initial_state, grad_x, partial,
        starts, lengths, documents, documents.bit_length(), length, tokens, channels, **constants, **tile.launch(),
    )  # fmt: skip
    total = partial.sum(0)
    empty = grad_y.new_empty(0)
    grad_initial_state = empty
    if initial_state is not None:
        grad_initial_state = torch.empty_like(initial_state)
        if width > 1:
            constants["ROWS"] = triton.next_power_of_2(width - 1)
            tile = GRAD_INITIAL_STATE.tile(device, constants, dtype_name(x.dtype))
            _grad_initial_state[documents, triton.cdiv(channels, tile.constants["BLOCK_C"])](
                grad_y, grad_stride, grad_final_state, x, x_stride, weight_float, bias_float, initial_state,
                grad_initial_state, starts, lengths, length, channels, **constants, **tile.launch(),
            )  # fmt: skip
    grad_weight = total[:-1].T.to(weight.dtype, memory_format=torch.contiguous_format)
    grad_bias = empty if bias is None else total[-1].to(bias.dtype, copy=True)
    return grad_x, grad_weight, grad_bias, grad_initial_state
