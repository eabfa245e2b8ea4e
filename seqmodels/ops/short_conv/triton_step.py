"""One step of the short convolution on a GPU: a program owns BLOCK_C channels of one sequence.

It reads the W-1 rows of the state once, writes them one row up, and adds the new input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _step(
    x, x_stride, weight, bias, state, y, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    state += row * (WIDTH - 1) * channels + c
    value = tl.load(x + row * x_stride + c, mask=in_channels, other=0.0).to(tl.float32)
    z = value * tl.load(weight + c * WIDTH + WIDTH - 1, mask=in_channels, other=0.0).to(tl.float32)
    for w in range(WIDTH - 1):
        old = tl.load(state + w * channels, mask=in_channels, other=0.0)
        z += old * tl.load(weight + c * WIDTH + w, mask=in_channels, other=0.0).to(tl.float32)
        tl.store(state + (w - 1) * channels, old, mask=in_channels & (w > 0))
    if WIDTH > 1:
        tl.store(state + (WIDTH - 2) * channels, value, mask=in_channels)
    if bias is not None:
        z += tl.load(bias + c, mask=in_channels, other=0.0).to(tl.float32)
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(y + row * channels + c, z, mask=in_channels)


STEP = KernelSpec(
    name="short_conv.step",
    function=_step,
    signature={
        "x": "*{dtype}", "x_stride": "i64", "weight": "*{dtype}", "bias": "*{dtype}", "state": "*fp32",
        "y": "*{dtype}", "channels": "i32",
    },
    tiles=(Tile({"BLOCK_C": 256}, num_warps=4, num_stages=1),),
    variants=({"WIDTH": 4, "SILU": True}, {"WIDTH": 3, "SILU": True, "bias": None}),
    divisible=("x_stride", "channels"),
)
KERNELS = [STEP]


def supports(x_t: Tensor, *rest: object) -> str | None:
    return "the Triton kernels take float32, bfloat16 and float16, not float64" if x_t.dtype == torch.float64 else None


def forward(x_t: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    batch_size, channels = x_t.shape
    x_t = x_t if x_t.stride(1) == 1 else x_t.contiguous()
    y = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    constants = {"WIDTH": weight.shape[1], "SILU": silu}
    tile = STEP.tile(device_properties(x_t.device.index), constants, dtype_name(x_t.dtype))
    bias = None if bias is None else bias.contiguous()
    _step[batch_size, triton.cdiv(channels, tile.constants["BLOCK_C"])](
        x_t, x_t.stride(0), weight.contiguous(), bias, state, y, channels, **constants, **tile.launch()
    )
    return y
