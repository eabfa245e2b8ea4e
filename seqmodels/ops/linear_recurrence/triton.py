"""Linear recurrence on a GPU.

    h[t] = a[t] h[t-1] + x[t];    g[t] = dh[t] + conj(a[t+1]) g[t+1],  dx = g,  da[t] = g[t] conj(h[t-1])

Tiling: a program owns BLOCK_C channels of one row and walks its tokens once, BLOCK_L at a time. Inside
a tile the pairs (a, x) are scanned in parallel over time with the product of affine maps; the state
before the tile enters through the scanned product of decays, and the tile's last row is carried on in
registers. Device memory sees every value once: 16 bytes a complex element for constant decays, 24 for
changing ones, as the definition needs.

Documents are flags of tokens: on a first token the decay of the carried state is 0 and decay times
initial state is added; padding has decay 0 and x 0. Tokens behind the row's end are the identity map.
The gradient of a constant decay is summed inside a program, and over rows afterwards in a fixed order:
nothing is atomic. Complex values lie as pairs: rows of 2 BLOCK_C floats are loaded whole and split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.linear_recurrence.boundaries import final_state_of, grad_initial_state, token_flags
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _compose(a_first, b_first, a, b):
    return a * a_first, a * b_first + b


@triton.jit
def _compose_complex(ar_first, ai_first, br_first, bi_first, ar, ai, br, bi):
    return (
        ar * ar_first - ai * ai_first,
        ar * ai_first + ai * ar_first,
        ar * br_first - ai * bi_first + br,
        ar * bi_first + ai * br_first + bi,
    )


@triton.jit
def _rows(pointer, row, inside, c, channels, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """(real, imaginary) of the given rows, zeros where not ``inside``; twice the same for real channels."""
    if COMPLEX:
        part = tl.arange(0, 2 * BLOCK_C) + 2 * c
        mask = inside[:, None] & (part < 2 * channels)[None, :]
        pairs = tl.load(pointer + row[:, None] * (2 * channels) + part[None, :], mask=mask, other=0.0)
        real, imaginary = tl.split(pairs.reshape(BLOCK_L, BLOCK_C, 2))
    else:
        part = tl.arange(0, BLOCK_C) + c
        mask = inside[:, None] & (part < channels)[None, :]
        real = tl.load(pointer + row[:, None] * channels + part[None, :], mask=mask, other=0.0)
        imaginary = real
    return real, imaginary


@triton.jit
def _store(pointer, row, inside, c, channels, real, imaginary, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr,
           BLOCK_C: tl.constexpr):  # fmt: skip
    if COMPLEX:
        part = tl.arange(0, 2 * BLOCK_C) + 2 * c
        mask = inside[:, None] & (part < 2 * channels)[None, :]
        values = tl.join(real, imaginary).reshape(BLOCK_L, 2 * BLOCK_C)
        tl.store(pointer + row[:, None] * (2 * channels) + part[None, :], values, mask=mask)
    else:
        part = tl.arange(0, BLOCK_C) + c
        mask = inside[:, None] & (part < channels)[None, :]
        tl.store(pointer + row[:, None] * channels + part[None, :], real, mask=mask)


@triton.jit
def _flags(flags, token, t, inside, length):
    """(valid, first, last) of tokens; without flags each row is one document."""
    if flags is None:
        valid = inside
        first = inside & (t == 0)
        last = inside & (t == length - 1)
    else:
        bits = tl.load(flags + token, mask=inside, other=0)
        valid = inside & ((bits & 1) != 0)
        first = inside & ((bits & 2) != 0)
        last = inside & ((bits & 4) != 0)
    return valid, first, last


@triton.jit(do_not_specialize=["length"])
def _forward(
    decay, x, initial_state, document, flags, h, length, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C
    step = tl.arange(0, BLOCK_L)
    carry_real = tl.zeros([BLOCK_C], tl.float32)
    carry_imaginary = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, length, BLOCK_L):
        t = begin + step
        token = row * length + t
        inside = t < length
        valid, first, _ = _flags(flags, token, t, inside, length)
        source = token if VARYING else tl.zeros_like(token)
        ar, ai = _rows(decay, source, valid, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        br, bi = _rows(x, token, valid, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        if initial_state is not None:
            slot = tl.zeros_like(token) + row if document is None else tl.load(document + token, mask=first, other=0)
            sr, si = _rows(initial_state, slot, first, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
            if COMPLEX:
                br += ar * sr - ai * si
                bi += ar * si + ai * sr
            else:
                br += ar * sr
        ar = tl.where(first[:, None], 0.0, ar)
        ar = tl.where(inside[:, None], ar, 1.0)
        last_row = (step == BLOCK_L - 1)[:, None]
        if COMPLEX:
            ai = tl.where((first | (inside == 0))[:, None], 0.0, ai)
            ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, _compose_complex)
            hr = br + ar * carry_real[None, :] - ai * carry_imaginary[None, :]
            hi = bi + ar * carry_imaginary[None, :] + ai * carry_real[None, :]
            carry_imaginary = tl.sum(tl.where(last_row, hi, 0.0), axis=0)
        else:
            ar, br = tl.associative_scan((ar, br), 0, _compose)
            hr = br + ar * carry_real[None, :]
            hi = hr
        carry_real = tl.sum(tl.where(last_row, hr, 0.0), axis=0)
        _store(h, token, inside, c, channels, hr, hi, COMPLEX, BLOCK_L, BLOCK_C)


@triton.jit(do_not_specialize=["length"])
def _backward(
    decay, h, initial_state, document, flags, grad_h, grad_final, grad_x, grad_decay, length, channels,
    VARYING: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_decay is (batch, length, channels) with VARYING, else (batch, channels)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C
    step = tl.arange(0, BLOCK_L)
    carry_real = tl.zeros([BLOCK_C], tl.float32)
    carry_imaginary = tl.zeros([BLOCK_C], tl.float32)
    total_real = tl.zeros([BLOCK_C], tl.float32)
    total_imaginary = tl.zeros([BLOCK_C], tl.float32)
    for done in range(0, length, BLOCK_L):
        # Tiles end at the row's end; the one at its start may reach over it.
        t = length - done - BLOCK_L + step
        token = row * length + t
        inside = t >= 0
        valid, first, last = _flags(flags, token, t, inside, length)
        slot = tl.zeros_like(token) + row if document is None else tl.load(document + token, mask=inside, other=0)
        er, ei = _rows(grad_h, token, valid, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        fr, fi = _rows(grad_final, slot, last, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        er += fr
        ei += fi
        # The decay of the token behind, conjugated; 0 at a document's end and in padding.
        source = token + 1 if VARYING else tl.zeros_like(token)
        ar, ai = _rows(decay, source, valid & (last == 0), c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        ar = tl.where(inside[:, None], ar, 1.0)
        first_row = (step == 0)[:, None]
        if COMPLEX:
            ar, ai, er, ei = tl.associative_scan((ar, -ai, er, ei), 0, _compose_complex, reverse=True)
            gr = er + ar * carry_real[None, :] - ai * carry_imaginary[None, :]
            gi = ei + ar * carry_imaginary[None, :] + ai * carry_real[None, :]
            carry_imaginary = tl.sum(tl.where(first_row, gi, 0.0), axis=0)
        else:
            ar, er = tl.associative_scan((ar, er), 0, _compose, reverse=True)
            gr = er + ar * carry_real[None, :]
            gi = gr
        carry_real = tl.sum(tl.where(first_row, gr, 0.0), axis=0)
        _store(grad_x, token, inside, c, channels, gr, gi, COMPLEX, BLOCK_L, BLOCK_C)

        pr, pi = _rows(h, token - 1, valid & (first == 0), c, channels, COMPLEX, BLOCK_L, BLOCK_C)
        if initial_state is not None:
            sr, si = _rows(initial_state, slot, first, c, channels, COMPLEX, BLOCK_L, BLOCK_C)
            pr += sr
            pi += si
        if COMPLEX:
            dr = gr * pr + gi * pi
            di = gi * pr - gr * pi
        else:
            dr = gr * pr
            di = dr
        if VARYING:
            _store(grad_decay, token, inside, c, channels, dr, di, COMPLEX, BLOCK_L, BLOCK_C)
        else:  # rows before the start have no state before them: their share is 0
            total_real += tl.sum(dr, axis=0)
            total_imaginary += tl.sum(di, axis=0)
    if not VARYING:
        one = tl.zeros([1], tl.int64) + row
        _store(
            grad_decay, one, one >= 0, c, channels, total_real[None, :], total_imaginary[None, :], COMPLEX, 1, BLOCK_C
        )


_SIGNATURE = {"decay": "*fp32", "initial_state": "*fp32", "document": "*i64", "flags": "*u8", "length": "i64",
              "channels": "i32"}  # fmt: skip
_ALONE = {"document": None, "flags": None}
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


def _launch(spec: KernelSpec, kernel: triton.JITFunction, x: Tensor, decay: Tensor, *tensors: Tensor | None) -> None:
    constants = {"VARYING": decay.dim() == x.dim(), "COMPLEX": x.dim() == 4}
    tile = spec.tile(device_properties(x.device.index), constants, "fp32")
    grid = (x.shape[0], triton.cdiv(x.shape[2], tile.constants["BLOCK_C"]))
    kernel[grid](decay.contiguous(), *tensors, x.shape[1], x.shape[2], **constants, **tile.launch())


def forward(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    state = None if initial_state is None else initial_state.contiguous()
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(FORWARD, _forward, x, decay, x.contiguous(), state, *token_flags(x, starts, lengths), h)
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
    varying = decay.dim() == x.dim()
    state = None if initial_state is None else initial_state.contiguous()
    grad_final = grad_final.contiguous()
    g = torch.empty_like(states)
    grad_decay = torch.empty_like(states) if varying else states.new_empty(states.shape[:1] + states.shape[2:])
    tables = token_flags(x, starts, lengths)
    _launch(BACKWARD, _backward, x, decay, states, state, *tables, grad_h.contiguous(), grad_final, g, grad_decay)
    if not varying:
        grad_decay = grad_decay.sum(0)
    if state is None:
        return grad_decay, g, grad_h.new_empty(0)
    return grad_decay, g, grad_initial_state(decay, g, grad_final, starts, lengths)
