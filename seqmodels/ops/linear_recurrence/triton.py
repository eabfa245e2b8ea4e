"""Linear recurrence on a GPU.

    h[t] = a[t] h[t-1] + x[t];    g[t] = dh[t] + conj(a[t+1]) g[t+1],  dx = g,  da[t] = g[t] conj(h[t-1])

Tiling: a program owns BLOCK_C channels of one row and walks its tokens once, BLOCK_L at a time. Inside
a tile the pairs (a, x) are scanned in parallel over time with the product of affine maps; the state
before the tile enters through the scanned product of decays, and the tile's last row is carried on in
registers. Device memory sees every value once: 16 bytes a complex element for constant decays, 24 for
changing ones, as the definition needs.

Where rows and channels are too few programs for the device, time is cut into segments (see
:mod:`seqmodels.ops.linear_recurrence.triton_segments`), each a program of its own that starts from the state before it:
x and changing decays are then read twice, 24 and 40 bytes.

Documents are flags of tokens: on a first token the decay of the carried state is 0 and decay times
initial state is added; padding has decay 0 and x 0. Tokens behind the row's end are the identity map.
The gradient of a constant decay is summed inside a program, and over segments and rows afterwards in a fixed order:
nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.linear_recurrence import triton_segments
from seqmodels.ops.linear_recurrence.boundaries import final_state_of, grad_initial_state, token_flags
from seqmodels.ops.linear_recurrence.triton_tiles import (
    apply,
    backward_maps,
    carried,
    flags_of,
    forward_maps,
    pick,
    rows_of,
    store_rows,
)
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit(do_not_specialize=["length", "segment"])
def _forward(
    decay, x, initial_state, document, flags, carry, h, length, segment, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """carry (batch, segments, channels): the state behind each segment."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C
    start = (tl.program_id(2) * segment).to(tl.int32)  # columns fit 32 bits, and are held by every thread
    end = tl.minimum(start + segment, length).to(tl.int32)
    step = tl.arange(0, BLOCK_L)
    carry_real = tl.zeros([BLOCK_C], tl.float32)
    carry_imaginary = tl.zeros([BLOCK_C], tl.float32)
    if carry is not None:
        before = tl.program_id(2) - 1
        carry_real, carry_imaginary = carried(carry, row, before, before >= 0, c, channels, COMPLEX, BLOCK_C)
    for begin in range(start, end, BLOCK_L):
        t = begin + step
        inside = t < end
        ar, ai, br, bi = forward_maps(
            decay, x, initial_state, document, flags, row, t, inside, c, length, channels,
            VARYING, COMPLEX, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        hr, hi = apply(ar, ai, br, bi, carry_real, carry_imaginary, COMPLEX)
        carry_real = pick(hr, step == BLOCK_L - 1)
        carry_imaginary = pick(hi, step == BLOCK_L - 1)
        store_rows(h, row * length + t, inside, c, channels, hr, hi, COMPLEX, BLOCK_L, BLOCK_C)


@triton.jit(do_not_specialize=["length", "segment"])
def _backward(
    decay, h, initial_state, document, flags, carry, grad_h, grad_final, grad_x, grad_decay, length, segment, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_decay is (batch, length, channels) with VARYING, else (batch, segments, channels); carry (batch, segments,
    channels) is g at each segment's first token."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C
    start = (tl.program_id(2) * segment).to(tl.int32)  # columns fit 32 bits, and are held by every thread
    end = tl.minimum(start + segment, length).to(tl.int32)
    step = tl.arange(0, BLOCK_L)
    carry_real = tl.zeros([BLOCK_C], tl.float32)
    carry_imaginary = tl.zeros([BLOCK_C], tl.float32)
    if carry is not None:
        behind = tl.program_id(2) + 1
        used = behind < tl.num_programs(2)
        carry_real, carry_imaginary = carried(carry, row, behind, used, c, channels, COMPLEX, BLOCK_C)
    total_real = tl.zeros([BLOCK_C], tl.float32)
    total_imaginary = tl.zeros([BLOCK_C], tl.float32)
    for done in range(0, end - start, BLOCK_L):
        # Tiles end at the segment's end; the one at its start may reach over it.
        t = end - done - BLOCK_L + step
        token = row * length + t
        inside = t >= start
        ar, ai, er, ei = backward_maps(
            decay, document, flags, grad_h, grad_final, row, t, inside, c, length, channels,
            VARYING, COMPLEX, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        gr, gi = apply(ar, ai, er, ei, carry_real, carry_imaginary, COMPLEX)
        carry_real = pick(gr, step == 0)
        carry_imaginary = pick(gi, step == 0)
        store_rows(grad_x, token, inside, c, channels, gr, gi, COMPLEX, BLOCK_L, BLOCK_C)

        valid, first, _ = flags_of(flags, token, t, inside, length)
        pr, pi = rows_of(h, token - 1, valid & (first == 0), c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        if initial_state is not None:
            slot = tl.zeros_like(token) + row if document is None else tl.load(document + token, mask=first, other=0)
            sr, si = rows_of(initial_state, slot, first, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
            pr += sr
            pi += si
        if COMPLEX:
            dr = gr * pr + gi * pi
            di = gi * pr - gr * pi
        else:
            dr = gr * pr
            di = dr
        if VARYING:
            store_rows(grad_decay, token, inside, c, channels, dr, di, COMPLEX, BLOCK_L, BLOCK_C)
        else:  # tokens before the start have no state before them: their share is 0
            total_real += tl.sum(dr, axis=0)
            total_imaginary += tl.sum(di, axis=0)
    if not VARYING:
        one = tl.zeros([1], tl.int64) + row * tl.num_programs(2) + tl.program_id(2)
        store_rows(
            grad_decay, one, one >= 0, c, channels, total_real[None, :], total_imaginary[None, :], COMPLEX, 1, BLOCK_C
        )


_POINTERS = ("decay", "initial_state", "carry")
_SIGNATURE = {**dict.fromkeys(_POINTERS, "*fp32"), "document": "*i64", "flags": "*u8", "length": "i64",
              "segment": "i64", "channels": "i32"}  # fmt: skip
_ALONE = {"document": None, "flags": None, "carry": None}
_VARIANTS = (
    {"VARYING": False, "COMPLEX": True, "initial_state": None, **_ALONE},
    {"VARYING": False, "COMPLEX": True},
    {"VARYING": True, "COMPLEX": True, "initial_state": None, **_ALONE},
    {"VARYING": True, "COMPLEX": True},
    {"VARYING": True, "COMPLEX": False, "initial_state": None, **_ALONE},
    {"VARYING": False, "COMPLEX": False},
)
_SMALL = Tile({"BLOCK_L": 32, "BLOCK_C": 16}, num_warps=4, num_stages=1)
FORWARD = KernelSpec(
    name="linear_recurrence.forward",
    function=_forward,
    signature={**_SIGNATURE, "x": "*fp32", "h": "*fp32"},
    tiles=(Tile({"BLOCK_L": 32, "BLOCK_C": 32}, num_warps=8, num_stages=1), _SMALL),
    variants=_VARIANTS,
    dtypes=("fp32",),
    divisible=("channels",),
)
BACKWARD = KernelSpec(
    name="linear_recurrence.backward",
    function=_backward,
    signature={**_SIGNATURE, **dict.fromkeys(("h", "grad_h", "grad_final", "grad_x", "grad_decay"), "*fp32")},
    tiles=(_SMALL, Tile({"BLOCK_L": 32, "BLOCK_C": 32}, num_warps=4, num_stages=1)),
    variants=_VARIANTS,
    dtypes=("fp32",),
    divisible=("channels",),
)
KERNELS = [FORWARD, BACKWARD]


def supports(decay: Tensor, x: Tensor, *rest: object) -> str | None:
    return None if x.dtype == torch.float32 else f"the Triton kernels take float32; x is {x.dtype}"


def _forward_states(
    decay: Tensor, x: Tensor, state: Tensor | None, tables: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """h from contiguous inputs."""
    constants = {"VARYING": decay.dim() == x.dim(), "COMPLEX": x.dim() == 4}
    tile = FORWARD.tile(device_properties(x.device.index), constants, "fp32")
    blocks = triton.cdiv(x.shape[2], tile.constants["BLOCK_C"])
    segment, count = triton_segments.plan(x, x.shape[0] * blocks)
    carry = None
    if count > 1:
        products, ends = triton_segments.ends(decay, x, state, *tables, segment, count)
        carry = _forward_states(products, ends, None, (None, None))
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward[(x.shape[0], blocks, count)](
        decay, x, state, *tables, carry, h, x.shape[1], segment, x.shape[2], **constants, **tile.launch()
    )
    return h


def forward(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    state = None if initial_state is None else initial_state.contiguous()
    h = _forward_states(decay.contiguous(), x.contiguous(), state, token_flags(x, starts, lengths))
    return h, final_state_of(h, state, starts, lengths)


def backward(
    grad_h: Tensor,
    grad_final: Tensor,
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    states: Tensor,
    final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    constants = {"VARYING": decay.dim() == x.dim(), "COMPLEX": x.dim() == 4}
    state = None if initial_state is None else initial_state.contiguous()
    decay, grad_h, grad_final = decay.contiguous(), grad_h.contiguous(), grad_final.contiguous()
    tables = token_flags(x, starts, lengths)
    tile = BACKWARD.tile(device_properties(x.device.index), constants, "fp32")
    blocks = triton.cdiv(x.shape[2], tile.constants["BLOCK_C"])
    segment, count = triton_segments.plan(x, x.shape[0] * blocks)
    carry = None
    if count > 1:
        products, ends = triton_segments.starts_of_gradient(decay, *tables, grad_h, grad_final, segment, count)
        carry = _forward_states(products.flip(1), ends.flip(1), None, (None, None)).flip(1).contiguous()
    g = torch.empty_like(states)
    shares = states.shape if constants["VARYING"] else (x.shape[0], count, *x.shape[2:])
    grad_decay = states.new_empty(shares)
    _backward[(x.shape[0], blocks, count)](
        decay, states, state, *tables, carry, grad_h, grad_final, g, grad_decay, x.shape[1], segment, x.shape[2],
        **constants, **tile.launch(),
    )  # fmt: skip
    if not constants["VARYING"]:
        grad_decay = grad_decay.sum((0, 1))
    if state is None:
        return grad_decay, g, grad_h.new_empty(0)
    return grad_decay, g, grad_initial_state(decay, g, grad_final, starts, lengths)
