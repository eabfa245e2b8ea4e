"""What follows Mamba-3's recurrence, on a GPU, in one pass over memory each way:

    t_r = y_r + skip v_r,    [t_r <- RMSNorm(t_r) norm_weight],    out = sum_r mimo_o_r t_r silu(mimo_z_r z)

with v_r = mimo_x_r x, which is recomputed from x. A program owns BLOCK_T tokens of one head. The
backward recomputes t and the gate; gradients of weights are one partial sum a program, added
afterwards in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _weight(source, head, rank, values, value_ok, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A row of (heads, ranks, head_dim) weights; 1 where there are none."""
    if source is not None:
        row = tl.load(source + (head * RANK + rank) * HEAD_DIM + values, mask=value_ok, other=0.0)
    else:
        row = tl.full(values.shape, 1.0, dtype=tl.float32)
    return row[None, :]


@triton.jit
def _place(valid, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """(head, flat tokens, offsets into a token, mask of what is stored, the part of it inside documents)."""
    head = tl.program_id(0) % HEADS
    token = (tl.program_id(0) // HEADS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    values = tl.arange(0, BLOCK_P)
    stored = (token < tokens)[:, None] & (values < HEAD_DIM)[None, :]
    inside = stored
    if valid is not None:
        inside = stored & tl.load(valid + token, mask=token < tokens, other=False)[:, None]
    return head, token[:, None], (head * HEAD_DIM + values)[None, :], stored, inside


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    y, x, x_stride, z, z_stride, skip, mimo_x, mimo_z, mimo_o, norm_weight, out, valid, tokens, epsilon,
    HEADS: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    head, token, lane, stored, inside = _place(valid, tokens, HEADS, HEAD_DIM, BLOCK_T, BLOCK_P)
    at = token * (HEADS * HEAD_DIM) + lane
    values = tl.arange(0, BLOCK_P)
    value_ok = values < HEAD_DIM
    x_tile = tl.load(x + token * x_stride + lane, mask=inside, other=0.0).to(tl.float32) * tl.load(skip + head)
    z_tile = tl.load(z + token * z_stride + lane, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for rank in range(RANK):
        row = (token * RANK + rank) * (HEADS * HEAD_DIM) + lane
        t = tl.load(y + row, mask=inside, other=0.0).to(tl.float32)
        t += x_tile * _weight(mimo_x, head, rank, values, value_ok, RANK, HEAD_DIM)
        if norm_weight is not None:
            t *= tl.rsqrt(tl.sum(t * t, 1) / HEAD_DIM + epsilon)[:, None]
            t *= _weight(norm_weight, head, 0, values, value_ok, 1, HEAD_DIM)
        gate = z_tile * _weight(mimo_z, head, rank, values, value_ok, RANK, HEAD_DIM)
        total += t * gate * tl.sigmoid(gate) * _weight(mimo_o, head, rank, values, value_ok, RANK, HEAD_DIM)
    tl.store(out + at, total, mask=stored)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    grad_out, y, x, x_stride, z, z_stride, skip, mimo_x, mimo_z, mimo_o, norm_weight, grad_y, grad_x, grad_z,
    grad_skip, grad_mimo_x, grad_mimo_z, grad_mimo_o, grad_norm, valid, tokens, epsilon,
    HEADS: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    head, token, lane, stored, inside = _place(valid, tokens, HEADS, HEAD_DIM, BLOCK_T, BLOCK_P)
    at = token * (HEADS * HEAD_DIM) + lane
    values = tl.arange(0, BLOCK_P)
    value_ok = values < HEAD_DIM
    block = (tl.program_id(0) // HEADS).to(tl.int64)
    skip_weight = tl.load(skip + head)
    x_tile = tl.load(x + token * x_stride + lane, mask=inside, other=0.0).to(tl.float32)
    z_tile = tl.load(z + token * z_stride + lane, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    x_sum = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)  # gradient of skip x
    z_sum = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    norm_sum = tl.zeros((BLOCK_P,), tl.float32)
    for rank in range(RANK):
        row = (token * RANK + rank) * (HEADS * HEAD_DIM) + lane
        x_weight = _weight(mimo_x, head, rank, values, value_ok, RANK, HEAD_DIM)
        z_weight = _weight(mimo_z, head, rank, values, value_ok, RANK, HEAD_DIM)
        o_weight = _weight(mimo_o, head, rank, values, value_ok, RANK, HEAD_DIM)
        t = tl.load(y + row, mask=inside, other=0.0).to(tl.float32) + skip_weight * x_tile * x_weight
        gate = z_tile * z_weight
        sigmoid = tl.sigmoid(gate)
        if norm_weight is not None:
            scale = tl.rsqrt(tl.sum(t * t, 1) / HEAD_DIM + epsilon)[:, None]
            t *= scale
            n_weight = _weight(norm_weight, head, 0, values, value_ok, 1, HEAD_DIM)
            scaled = t * n_weight
        else:
            scaled = t
        grad_scaled = grad * o_weight * gate * sigmoid
        grad_gate = grad * o_weight * scaled * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        z_sum += grad_gate * z_weight
        partial = (block * HEADS + head) * RANK * HEAD_DIM + rank * HEAD_DIM + values
        if mimo_o is not None:
            tl.store(grad_mimo_o + partial, tl.sum(grad * scaled * gate * sigmoid, 0), mask=value_ok)
            tl.store(grad_mimo_z + partial, tl.sum(grad_gate * z_tile, 0), mask=value_ok)
        if norm_weight is not None:
            norm_sum += tl.sum(grad_scaled * t, 0)
            grad_scaled *= n_weight
            grad_scaled = scale * (grad_scaled - t * (tl.sum(grad_scaled * t, 1) / HEAD_DIM)[:, None])
        if mimo_x is not None:
            tl.store(grad_mimo_x + partial, skip_weight * tl.sum(grad_scaled * x_tile, 0), mask=value_ok)
        x_sum += grad_scaled * x_weight
        tl.store(grad_y + row, grad_scaled, mask=stored)
    tl.store(grad_x + at, x_sum * skip_weight, mask=stored)
    tl.store(grad_z + at, z_sum, mask=stored)
    tl.store(grad_skip + block * HEADS + head, tl.sum(tl.sum(x_sum * x_tile, 1), 0))
    if norm_weight is not None:
        tl.store(grad_norm + (block * HEADS + head) * HEAD_DIM + values, norm_sum, mask=value_ok)


_MIXES = ("mimo_x", "mimo_z", "mimo_o")
_INPUTS = {
    "y": "*{dtype}", "x": "*{dtype}", "x_stride": "i64", "z": "*{dtype}", "z_stride": "i64",
    **dict.fromkeys(("skip", *_MIXES, "norm_weight"), "*fp32"),
}  # fmt: skip
_TAIL = {"valid": "*i1", "tokens": "i64", "epsilon": "fp32"}
_SISO = {"HEADS": 32, "RANK": 1, "HEAD_DIM": 64, "BLOCK_P": 64, **dict.fromkeys(_MIXES), "norm_weight": None}
_MIMO = {"HEADS": 32, "RANK": 4, "HEAD_DIM": 64, "BLOCK_P": 64}
_TILES = (Tile({"BLOCK_T": 32}, num_warps=4, num_stages=1),)
FORWARD = KernelSpec(
    name="mamba3.epilogue",
    function=_forward,
    signature={**_INPUTS, "out": "*{dtype}", **_TAIL},
    tiles=_TILES,
    variants=({**_SISO, "valid": None}, _MIMO),
    divisible=("x_stride", "z_stride"),
)
_PARTIALS = {f"grad_{name}": None for name in (*_MIXES, "norm")}
BACKWARD = KernelSpec(
    name="mamba3.epilogue_backward",
    function=_backward,
    signature={
        "grad_out": "*{dtype}",
        **_INPUTS,
        **dict.fromkeys(("grad_y", "grad_x", "grad_z"), "*{dtype}"),
        **dict.fromkeys(("grad_skip", *_PARTIALS), "*fp32"),
        **_TAIL,
    },
    tiles=_TILES,
    variants=({**_SISO, **_PARTIALS, "valid": None}, _MIMO),
    divisible=("x_stride", "z_stride"),
)
KERNELS = [FORWARD, BACKWARD]


def _constants(y: Tensor) -> dict[str, Any]:
    _, _, ranks, heads, head_dim = y.shape
    block = max(16, triton.next_power_of_2(head_dim))
    return {"HEADS": heads, "RANK": ranks, "HEAD_DIM": head_dim, "BLOCK_P": block}


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x (batch, length, heads, head_dim) as dense tokens at one stride over the whole grid."""
    batch_size, length, _, head_dim = x.shape
    dense = x.stride(3) == 1 and x.stride(2) == head_dim
    if not dense or (batch_size > 1 and x.stride(0) != length * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1)


class Epilogue(torch.autograd.Function):
    """out (batch, length, heads, head_dim) of y (batch, length, ranks, heads, head_dim), x, z and the weights."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, z: Tensor, skip: Tensor, mimo_x: Tensor | None, mimo_z: Tensor | None,
        mimo_o: Tensor | None, norm_weight: Tensor | None, valid: Tensor | None, epsilon: float,
    ) -> Tensor:  # fmt: skip
        (x, x_stride), (z, z_stride) = _rows(x), _rows(z)
        weights = [None if w is None else w.contiguous() for w in (skip, mimo_x, mimo_z, mimo_o, norm_weight)]
        inputs = (y.contiguous(), x, x_stride, z, z_stride, *weights)
        constants = _constants(y)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        tokens = x.shape[0] * x.shape[1]
        tile = FORWARD.tile(device_properties(x.device.index), constants, dtype_name(x.dtype))
        grid = (triton.cdiv(tokens, tile.constants["BLOCK_T"]) * constants["HEADS"],)
        _forward[grid](*inputs, out, valid, tokens, epsilon, **constants, **tile.launch())
        ctx.save_for_backward(inputs[0], x, z, *weights, valid)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        y, x, z, *weights, valid = ctx.saved_tensors
        _, mimo_x, _, _, norm_weight = weights
        inputs = (y, *_rows(x), *_rows(z), *weights)
        constants = _constants(y)
        heads, ranks, head_dim = constants["HEADS"], constants["RANK"], constants["HEAD_DIM"]
        tokens = x.shape[0] * x.shape[1]
        tile = BACKWARD.tile(device_properties(x.device.index), constants, dtype_name(x.dtype))
        blocks = triton.cdiv(tokens, tile.constants["BLOCK_T"])
        grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (y, x, z)]
        skip_part = x.new_empty((blocks, heads), dtype=torch.float32)
        mix_parts: list[Tensor | None] = [None] * 3
        if mimo_x is not None:
            mix_parts = [x.new_empty((blocks, heads, ranks, head_dim), dtype=torch.float32) for _ in range(3)]
        norm_part = None if norm_weight is None else x.new_empty((blocks, heads * head_dim), dtype=torch.float32)
        _backward[(blocks * heads,)](
            grad_out.contiguous(), *inputs, *grads, skip_part, *mix_parts, norm_part, valid, tokens, ctx.epsilon,
            **constants, **tile.launch(),
        )  # fmt: skip
        parts = (skip_part, *mix_parts, norm_part)
        return *grads, *(None if part is None else part.sum(0) for part in parts), None, None
