"""Sparse global attention on a GPU: one kernel forward; three and a sum for the gradients, in a fixed order.

What the backward holds beside its results: the keys' and values' gradients in float32, and the blocks' parts of
those of the chosen keys, T x G x head_dim numbers a head. Those are made for a few heads at a time, so that they
never take more than twice the room of the float32 gradients: linear in the length, whatever the number of heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.sparse_attention.triton_forward import FORWARD
from seqmodels.ops.sparse_attention.triton_gradient import COLLECT, KEY_GRADIENT, QUERY_GRADIENT
from seqmodels.ops.sparse_attention.triton_tiles import LARGEST_WIDTH, constants, declared
from seqmodels.ops.tiles import Tile, device_properties

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(q: Tensor, keys: Tensor, *_: object) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if q.dtype not in _DTYPES:
        return f"they compute in bfloat16, float16 or float32, not {q.dtype}"
    if q.shape[-1] > LARGEST_WIDTH:
        return f"their tiles hold head widths up to {LARGEST_WIDTH}, not {q.shape[-1]}"
    if max(q.shape[:3].numel(), keys.shape[:2].numel()) >= 2**31:
        return f"they count tokens x heads in 32 bits; {tuple(q.shape)} (batch, length, heads, width) are too many"
    return None


def forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    token: Tensor,
    position: Tensor,
    local_source: Tensor,
    global_source: Tensor,
    global_position: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, keys, values, bias = (x.contiguous() for x in (q, keys, values, bias))
    y = torch.zeros_like(q)  # padding's output
    log_sum = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    kernel, fixed, tile = _launch(FORWARD, q, keys)
    kernel[_grid(q, keys, token, tile)](
        q, keys, values, bias, token, position, local_source, global_source, global_position,
        y, log_sum, token.shape[1], window, global_source.shape[1], scale * _LOG2E, **fixed, **tile.launch(),
    )  # fmt: skip
    return y, log_sum


def backward(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    token: Tensor,
    position: Tensor,
    local_source: Tensor,
    global_source: Tensor,
    global_position: Tensor,
    window: int,
    scale: float,
    y: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, ...]:
    grad, q, keys, values, bias = (x.contiguous() for x in (grad, q, keys, values, bias))
    (blocks, size), num_globals = token.shape, global_source.shape[1]
    rows, heads, width = keys.shape
    delta = torch.empty_like(log_sum)
    grad_q = torch.zeros_like(q)
    kernel, fixed, tile = _launch(QUERY_GRADIENT, q, keys)
    kernel[_grid(q, keys, token, tile)](
        q, keys, values, bias, token, position, local_source, global_source, global_position,
        grad, y, log_sum, delta, grad_q, size, window, num_globals, scale, **fixed, **tile.launch(),
    )  # fmt: skip

    def key_gradient(
        sources: Tensor, outputs: tuple[Tensor, Tensor, Tensor | None], first_key: int, first_head: int, num_heads: int
    ) -> None:
        far = sources is global_source
        kernel, fixed, tile = _launch(KEY_GRADIENT, q, keys, FAR=far)
        tiles = triton.cdiv(sources.shape[1] - first_key, tile.constants["BLOCK_N"])
        kernel[(blocks, tiles * num_heads)](
            q, keys, values, bias if far else None, token, position if far else None, sources,
            global_position if far else None, grad, log_sum, delta, *outputs,
            blocks, size, window, sources.shape[1], first_key, first_head, num_heads, scale, **fixed, **tile.launch(),
        )  # fmt: skip

    grad_keys, grad_values = (torch.zeros(keys.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    # Without a state every local key is a token of some block; keys of a state stand in front of the first block.
    first_key = window - 1 if rows == q.shape[0] * q.shape[1] else 0
    key_gradient(local_source, (grad_keys, grad_values, None), first_key, 0, heads)
    grad_bias = torch.zeros_like(bias)
    if num_globals:
        chosen = global_source.flatten()
        ordered, order = chosen.sort(stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(rows + 1, device=q.device))
        parts_of_bias = bias.new_zeros(chosen.shape[0], heads)
        chunk = min(heads, max(1, 2 * rows * heads // chosen.shape[0]))
        for head in range(0, heads, chunk):
            count = min(chunk, heads - head)
            parts = tuple(keys.new_empty(chosen.shape[0], count * width, dtype=torch.float32) for _ in range(2))
            key_gradient(global_source, (*parts, parts_of_bias), 0, head, count)
            for part, target in zip(parts, (grad_keys, grad_values), strict=True):
                _collect(part, target, order, bounds, head * width)
        _collect(parts_of_bias.sum(1, keepdim=True), grad_bias, order, bounds, 0)
    return grad_q, grad_keys.to(keys.dtype), grad_values.to(values.dtype), grad_bias


_LOG2E = 1.4426950408889634


def _launch(specs: tuple[KernelSpec, ...], q: Tensor, keys: Tensor, **flags: bool) -> tuple[Any, dict[str, int], Tile]:
    """A kernel, its constants for these heads, and its tile."""
    heads, width = keys.shape[1:]
    device, dtype = device_properties(q.device.index), dtype_name(q.dtype)
    fixed = constants(heads, q.shape[2] // heads, width) | flags
    spec = declared(specs, device, dtype)
    return spec.function, fixed, spec.tile(device, fixed, dtype)


def _grid(q: Tensor, keys: Tensor, token: Tensor, tile: Tile) -> tuple[int, int]:
    """Programs that walk keys: blocks; and tiles of (slot, query head) rows times key heads."""
    heads = keys.shape[1]
    rows = token.shape[1] * (q.shape[2] // heads)
    return token.shape[0], triton.cdiv(rows, tile.constants["BLOCK_M"]) * heads


def _collect(parts: Tensor, target: Tensor, order: Tensor, bounds: Tensor, first_column: int) -> None:
    tile = COLLECT.tiles[0]
    width, rows = parts.shape[1], target.shape[0]
    COLLECT.function[(rows, triton.cdiv(width, tile.constants["BLOCK_W"]))](
        parts, target, order, bounds, width, target[0].numel(), first_column, **tile.launch()
    )
