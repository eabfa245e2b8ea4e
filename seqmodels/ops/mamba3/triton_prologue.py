"""Queries and keys of Mamba-3 on a GPU, from the projections B and C:

    phi_t = phi_{t-1} + phase_step_t rate_t,    k_t,r = rotate(phi_t, norm(b_t,r) weight + bias_r),    q from c

Tiling: a program owns BLOCK_T tokens of one document and one head (one group in the backward, which
sums over its heads). The phase before each such chunk comes from a first kernel that sums the
increments chunk by chunk, so that chunks are independent. Phases are summed in float64, which the
rotation needs (over 64K tokens float32 sums drift by 1e-3 rad) and which costs little beside the
memory traffic, and are reduced to a quadrant before sine and cosine, so that these are short
polynomials.

A tile is held as its two halves u, w of rotation pairs: lanes (2i, 2i + 1) when adjacent, (i, i + N / 2)
when half. The backward recomputes normed and rotated values from B and C; nothing but those is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.tiles import Tile, device_properties


@triton.jit
def _span(starts, lengths, length, slot, chunks, BLOCK_T: tl.constexpr):
    """(first token, tokens left) of chunk ``slot``: chunks of one document stand behind one another."""
    document = slot // chunks
    offset = (slot % chunks) * BLOCK_T
    if starts is not None:
        first = tl.load(starts + document) + offset
        size = tl.load(lengths + document) - offset
    else:
        first = document * length + offset
        size = length - offset
    return first, size


@triton.jit
def _increments(
    phase_step, rate, first, size, head,
    HEADS: tl.constexpr, ANGLES: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """phase_step_t rate_t of a chunk in float64, zero past its end and past the last angle."""
    tokens = tl.arange(0, BLOCK_T)
    angles = tl.arange(0, HALF)
    ok = tokens < size
    step = tl.load(phase_step + (first + tokens) * HEADS + head, mask=ok, other=0.0)
    rates = tl.load(
        rate + (first + tokens)[:, None] * ANGLES + angles[None, :],
        mask=ok[:, None] & (angles < ANGLES)[None, :], other=0.0,
    )  # fmt: skip
    return step.to(tl.float64)[:, None] * rates.to(tl.float64)


@triton.jit
def cosine_and_sine(phase):
    """Of a float64 phase, in float32: by quadrants, with Taylor polynomials on [-pi/4, pi/4]."""
    quarter = phase * 0.6366197723675814
    number = tl.floor(quarter + 0.5)
    x = ((quarter - number) * 1.5707963267948966).to(tl.float32)
    quadrant = (number - 4.0 * tl.floor(number * 0.25)).to(tl.int32)
    z = x * x
    sine = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cosine = 1.0 + z * (-0.5 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    odd = (quadrant & 1) == 1
    turned_cosine = tl.where(odd, -sine, cosine)
    turned_sine = tl.where(odd, cosine, sine)
    flip = tl.where(quadrant >= 2, -1.0, 1.0)
    return turned_cosine * flip, turned_sine * flip


@triton.jit
def _rotation(
    before, phase_step, rate, slot, first, size, head,
    HEADS: tl.constexpr, ANGLES: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Cosine and sine of every token's phase, float32 (BLOCK_T, HALF); lanes without an angle are not turned."""
    angles = tl.arange(0, HALF)
    total = tl.cumsum(_increments(phase_step, rate, first, size, head, HEADS, ANGLES, HALF, BLOCK_T), 0)
    start = tl.load(before + (slot * HEADS + head) * ANGLES + angles, mask=angles < ANGLES, other=0.0)
    return cosine_and_sine(total + start[None, :])


@triton.jit
def _pairs(source, ok, stride, STATE: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, ADJACENT: tl.constexpr):
    """Rows of STATE lanes, ``stride`` apart, as (u, w) in float32."""
    rows = tl.arange(0, BLOCK_T)[:, None] * stride
    if ADJACENT:
        lanes = tl.arange(0, 2 * HALF)
        x = tl.load(source + rows + lanes[None, :], mask=ok[:, None] & (lanes < STATE)[None, :], other=0.0)
        u, w = tl.split(x.to(tl.float32).reshape(BLOCK_T, HALF, 2))
    else:
        lanes = tl.arange(0, HALF)
        mask = ok[:, None] & (lanes < STATE // 2)[None, :]
        u = tl.load(source + rows + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(source + STATE // 2 + rows + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
    return u, w


@triton.jit
def _lanes(STATE: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr):
    """Lane numbers of u and w."""
    index = tl.arange(0, HALF)
    if ADJACENT:
        u, w = 2 * index, 2 * index + 1
    else:
        u, w = tl.where(index < STATE // 2, index, STATE), tl.where(index < STATE // 2, index + STATE // 2, STATE)
    return u, w


@triton.jit
def _store_pairs(
    target, u, w, ok, stride, STATE: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, ADJACENT: tl.constexpr
):
    rows = tl.arange(0, BLOCK_T)[:, None] * stride
    if ADJACENT:
        lanes = tl.arange(0, 2 * HALF)
        x = tl.join(u, w).reshape(BLOCK_T, 2 * HALF)
        tl.store(target + rows + lanes[None, :], x, mask=ok[:, None] & (lanes < STATE)[None, :])
    else:
        lanes = tl.arange(0, HALF)
        mask = ok[:, None] & (lanes < STATE // 2)[None, :]
        tl.store(target + rows + lanes[None, :], u, mask=mask)
        tl.store(target + STATE // 2 + rows + lanes[None, :], w, mask=mask)


@triton.jit
def _inverse_norm(u, w, epsilon, STATE: tl.constexpr):
    return tl.rsqrt((tl.sum(u * u, 1) + tl.sum(w * w, 1)) / STATE + epsilon)[:, None]


@triton.jit(do_not_specialize=["length", "chunks"])
def _totals(
    phase_step, rate, totals, starts, lengths, length, chunks,
    HEADS: tl.constexpr, ANGLES: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Phase gained in each chunk: (chunks of all documents, heads, angles), float64."""
    head = tl.program_id(0) % HEADS
    slot = (tl.program_id(0) // HEADS).to(tl.int64)
    first, size = _span(starts, lengths, length, slot, chunks, BLOCK_T)
    angles = tl.arange(0, HALF)
    total = tl.sum(_increments(phase_step, rate, first, size, head, HEADS, ANGLES, HALF, BLOCK_T), 0)
    tl.store(totals + (slot * HEADS + head) * ANGLES + angles, total, mask=angles < ANGLES)


@triton.jit
def _turned(
    raw, weight, bias, target, cosine, sine, ok, raw_stride, target_stride, epsilon,
    STATE: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Norm, weight, bias, rotation of one rank of one head, from ``raw`` to ``target``."""
    u, w = _pairs(raw, ok, raw_stride, STATE, HALF, BLOCK_T, ADJACENT)
    u_lane, w_lane = _lanes(STATE, HALF, ADJACENT)
    scale = _inverse_norm(u, w, epsilon, STATE)
    u = u * scale * tl.load(weight + u_lane, mask=u_lane < STATE, other=0.0)[None, :]
    w = w * scale * tl.load(weight + w_lane, mask=w_lane < STATE, other=0.0)[None, :]
    u += tl.load(bias + u_lane, mask=u_lane < STATE, other=0.0)[None, :]
    w += tl.load(bias + w_lane, mask=w_lane < STATE, other=0.0)[None, :]
    turned_u = u * cosine - w * sine
    turned_w = u * sine + w * cosine
    _store_pairs(target, turned_u, turned_w, ok, target_stride, STATE, HALF, BLOCK_T, ADJACENT)


@triton.jit(do_not_specialize=["length", "chunks"])
def _forward(
    b, c, before, phase_step, rate, b_weight, c_weight, b_bias, c_bias, k, q, starts, lengths, length, chunks, epsilon,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, STATE: tl.constexpr, ANGLES: tl.constexpr,
    ADJACENT: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    slot = (tl.program_id(0) // HEADS).to(tl.int64)
    group = head * GROUPS // HEADS
    first, size = _span(starts, lengths, length, slot, chunks, BLOCK_T)
    ok = tl.arange(0, BLOCK_T) < size
    cosine, sine = _rotation(before, phase_step, rate, slot, first, size, head, HEADS, ANGLES, HALF, BLOCK_T)
    for rank in tl.static_range(RANK):
        source = ((first * RANK + rank) * GROUPS + group) * STATE
        target = ((first * RANK + rank) * HEADS + head) * STATE
        bias = (head * RANK + rank) * STATE
        _turned(
            b + source, b_weight, b_bias + bias, k + target, cosine, sine, ok,
            RANK * GROUPS * STATE, RANK * HEADS * STATE, epsilon, STATE, HALF, BLOCK_T, ADJACENT,
        )  # fmt: skip
        _turned(
            c + source, c_weight, c_bias + bias, q + target, cosine, sine, ok,
            RANK * GROUPS * STATE, RANK * HEADS * STATE, epsilon, STATE, HALF, BLOCK_T, ADJACENT,
        )  # fmt: skip


@triton.jit
def _turned_backward(
    raw, weight, bias, grad, grad_raw, grad_weight, grad_bias, grad_phase, grad_total,
    before, phase_step, rate, slot, first, size, group, rank, add, epsilon,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, STATE: tl.constexpr, ANGLES: tl.constexpr,
    ADJACENT: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradients of one rank of one group: of the raw tile, and partial sums of this chunk for the weights.

    ``add``: what the phases have so far, from another rank or the other operand, stands in memory.
    """
    tl.debug_barrier()
    tokens = tl.arange(0, BLOCK_T)
    ok = tokens < size
    angles = tl.arange(0, HALF)
    u_lane, w_lane = _lanes(STATE, HALF, ADJACENT)
    source = ((first * RANK + rank) * GROUPS + group) * STATE
    u_raw, w_raw = _pairs(raw + source, ok, RANK * GROUPS * STATE, STATE, HALF, BLOCK_T, ADJACENT)
    scale = _inverse_norm(u_raw, w_raw, epsilon, STATE)
    u_raw *= scale
    w_raw *= scale
    u_weight = tl.load(weight + u_lane, mask=u_lane < STATE, other=0.0)[None, :]
    w_weight = tl.load(weight + w_lane, mask=w_lane < STATE, other=0.0)[None, :]
    u_sum = tl.zeros((BLOCK_T, HALF), tl.float32)
    w_sum = tl.zeros((BLOCK_T, HALF), tl.float32)
    for index in tl.range(0, HEADS // GROUPS, disable_licm=True):
        head = group * (HEADS // GROUPS) + index
        row = (head * RANK + rank) * STATE
        u = u_raw * u_weight + tl.load(bias + row + u_lane, mask=u_lane < STATE, other=0.0)[None, :]
        w = w_raw * w_weight + tl.load(bias + row + w_lane, mask=w_lane < STATE, other=0.0)[None, :]
        cosine, sine = _rotation(before, phase_step, rate, slot, first, size, head, HEADS, ANGLES, HALF, BLOCK_T)
        target = ((first * RANK + rank) * HEADS + head) * STATE
        u_grad, w_grad = _pairs(grad + target, ok, RANK * HEADS * STATE, STATE, HALF, BLOCK_T, ADJACENT)
        # d(u cos - w sin)/dphi = -(u sin + w cos), and so on.
        turn = w_grad * (u * cosine - w * sine) - u_grad * (u * sine + w * cosine)
        at = grad_phase + ((first + tokens)[:, None] * HEADS + head) * ANGLES + angles[None, :]
        mask = ok[:, None] & (angles < ANGLES)[None, :]
        total_at = grad_total + (slot * HEADS + head) * ANGLES + angles
        turn += tl.load(at, mask=mask & add, other=0.0)
        tl.store(at, turn, mask=mask)
        tl.store(total_at, tl.sum(turn.to(tl.float64), 0), mask=angles < ANGLES)
        u_back = u_grad * cosine + w_grad * sine
        w_back = w_grad * cosine - u_grad * sine
        u_sum += u_back
        w_sum += w_back
        partial = grad_bias + slot * (HEADS * RANK * STATE) + row
        tl.store(partial + u_lane, tl.sum(u_back, 0), mask=u_lane < STATE)
        tl.store(partial + w_lane, tl.sum(w_back, 0), mask=w_lane < STATE)
    partial = grad_weight + ((slot * GROUPS + group) * RANK + rank) * STATE
    tl.store(partial + u_lane, tl.sum(u_sum * u_raw, 0), mask=u_lane < STATE)
    tl.store(partial + w_lane, tl.sum(w_sum * w_raw, 0), mask=w_lane < STATE)
    u_sum *= u_weight
    w_sum *= w_weight
    mean = ((tl.sum(u_sum * u_raw, 1) + tl.sum(w_sum * w_raw, 1)) / STATE)[:, None]
    u_sum = scale * (u_sum - u_raw * mean)
    w_sum = scale * (w_sum - w_raw * mean)
    _store_pairs(grad_raw + source, u_sum, w_sum, ok, RANK * GROUPS * STATE, STATE, HALF, BLOCK_T, ADJACENT)


@triton.jit(do_not_specialize=["length", "chunks"])
def _backward(
    b, c, before, phase_step, rate, b_weight, c_weight, b_bias, c_bias, grad_k, grad_q,
    grad_b, grad_c, grad_b_weight, grad_c_weight, grad_b_bias, grad_c_bias, grad_phase, grad_total,
    starts, lengths, length, chunks, epsilon,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, STATE: tl.constexpr, ANGLES: tl.constexpr,
    ADJACENT: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % GROUPS
    slot = (tl.program_id(0) // GROUPS).to(tl.int64)
    first, size = _span(starts, lengths, length, slot, chunks, BLOCK_T)
    for rank in range(RANK):
        _turned_backward(
            b, b_weight, b_bias, grad_k, grad_b, grad_b_weight, grad_b_bias, grad_phase, grad_total,
            before, phase_step, rate, slot, first, size, group, rank, rank > 0, epsilon,
            HEADS, GROUPS, RANK, STATE, ANGLES, ADJACENT, HALF, BLOCK_T,
        )  # fmt: skip
        _turned_backward(
            c, c_weight, c_bias, grad_q, grad_c, grad_c_weight, grad_c_bias, grad_phase, grad_total,
            before, phase_step, rate, slot, first, size, group, rank, rank >= 0, epsilon,
            HEADS, GROUPS, RANK, STATE, ANGLES, ADJACENT, HALF, BLOCK_T,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "chunks"])
def _phase_backward(
    grad_phase, after, phase_step, rate, grad_step, grad_rate, starts, lengths, length, chunks,
    HEADS: tl.constexpr, ANGLES: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """An increment is in every phase from its token on: suffix sums, then over angles and over heads."""
    slot = tl.program_id(0).to(tl.int64)
    first, size = _span(starts, lengths, length, slot, chunks, BLOCK_T)
    tokens = tl.arange(0, BLOCK_T)
    angles = tl.arange(0, HALF)
    ok = tokens < size
    mask = ok[:, None] & (angles < ANGLES)[None, :]
    rate_at = (first + tokens)[:, None] * ANGLES + angles[None, :]
    rates = tl.load(rate + rate_at, mask=mask, other=0.0)
    rate_sum = tl.zeros((BLOCK_T, HALF), tl.float32)
    for head in range(HEADS):
        at = ((first + tokens)[:, None] * HEADS + head) * ANGLES + angles[None, :]
        own = tl.load(grad_phase + at, mask=mask, other=0.0).to(tl.float64)
        later = tl.load(after + (slot * HEADS + head) * ANGLES + angles, mask=angles < ANGLES, other=0.0)
        suffix = (tl.cumsum(own, 0, reverse=True) + later[None, :]).to(tl.float32)
        step_at = (first + tokens) * HEADS + head
        rate_sum += suffix * tl.load(phase_step + step_at, mask=ok, other=0.0)[:, None]
        tl.store(grad_step + step_at, tl.sum(suffix * rates, 1), mask=ok)
    tl.store(grad_rate + rate_at, rate_sum, mask=mask)


# All kernels cut the same chunks, so every tile has the same BLOCK_T.
_DOCUMENTS = {"starts": "*i64", "lengths": "*i64", "length": "i64", "chunks": "i64"}
_PHASE = {"before": "*fp64", "phase_step": "*fp32", "rate": "*fp32"}
_WEIGHTS = dict.fromkeys(("b_weight", "c_weight", "b_bias", "c_bias"), "*fp32")
_PHASE_CONSTANTS = {"HEADS": 32, "ANGLES": 32, "HALF": 64}
_CONSTANTS = {**_PHASE_CONSTANTS, "GROUPS": 1, "RANK": 1, "STATE": 128, "ADJACENT": True}
_NO_DOCUMENTS = {"starts": None, "lengths": None}
_VARIANTS = (
    {**_CONSTANTS, **_NO_DOCUMENTS},
    {**_CONSTANTS, **_NO_DOCUMENTS, "RANK": 4, "ADJACENT": False},
    {**_CONSTANTS, "STATE": 64, "HALF": 32, "ANGLES": 16, "GROUPS": 4},
)
TOTALS = KernelSpec(
    name="mamba3.phase_totals",
    function=_totals,
    signature={"phase_step": "*fp32", "rate": "*fp32", "totals": "*fp64", **_DOCUMENTS},
    tiles=(Tile({"BLOCK_T": 16}, num_warps=4, num_stages=1),),
    variants=({**_PHASE_CONSTANTS, **_NO_DOCUMENTS}, _PHASE_CONSTANTS),
    dtypes=("fp32",),
)
FORWARD = KernelSpec(
    name="mamba3.prologue",
    function=_forward,
    signature={
        "b": "*{dtype}",
        "c": "*{dtype}",
        **_PHASE,
        **_WEIGHTS,
        "k": "*{dtype}",
        "q": "*{dtype}",
        **_DOCUMENTS,
        "epsilon": "fp32",
    },
    tiles=(Tile({"BLOCK_T": 16}, num_warps=8, num_stages=1),),
    variants=_VARIANTS,
)
BACKWARD = KernelSpec(
    name="mamba3.prologue_backward",
    function=_backward,
    signature={
        "b": "*{dtype}",
        "c": "*{dtype}",
        **_PHASE,
        **_WEIGHTS,
        **dict.fromkeys(("grad_k", "grad_q", "grad_b", "grad_c"), "*{dtype}"),
        **dict.fromkeys(("grad_b_weight", "grad_c_weight", "grad_b_bias", "grad_c_bias", "grad_phase"), "*fp32"),
        "grad_total": "*fp64",
        **_DOCUMENTS,
        "epsilon": "fp32",
    },
    tiles=(Tile({"BLOCK_T": 16}, num_warps=4, num_stages=1),),
    variants=_VARIANTS,
)
PHASE_BACKWARD = KernelSpec(
    name="mamba3.phase_backward",
    function=_phase_backward,
    signature={
        "grad_phase": "*fp32",
        "after": "*fp64",
        "phase_step": "*fp32",
        "rate": "*fp32",
        "grad_step": "*fp32",
        "grad_rate": "*fp32",
        **_DOCUMENTS,
    },
    tiles=(Tile({"BLOCK_T": 16}, num_warps=4, num_stages=1),),
    variants=({**_PHASE_CONSTANTS, **_NO_DOCUMENTS}, _PHASE_CONSTANTS),
    dtypes=("fp32",),
)
KERNELS = [TOTALS, FORWARD, BACKWARD, PHASE_BACKWARD]


class Prologue(torch.autograd.Function):
    """(q, k, final phase) of raw b, c (batch, length, ranks, groups, state) and the arguments of the op."""

    @staticmethod
    def forward(
        ctx: Any, b: Tensor, c: Tensor, phase_step: Tensor, rate: Tensor, b_weight: Tensor, c_weight: Tensor,
        b_bias: Tensor, c_bias: Tensor, initial_angle: Tensor | None, starts: Tensor | None, lengths: Tensor | None,
        pairing: str, epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        tensors = [x.contiguous() for x in (b, c, phase_step, rate, b_weight, c_weight, b_bias, c_bias)]
        b, c, phase_step, rate, *weights = tensors
        batch_size, length, ranks, groups, state = b.shape
        heads, angles = phase_step.shape[-1], rate.shape[-1]
        documents = batch_size if starts is None else starts.shape[0]
        half = max(16, triton.next_power_of_2((state + 1) // 2))
        phase_constants = {"HEADS": heads, "ANGLES": angles, "HALF": half}
        constants = {
            **phase_constants, "GROUPS": groups, "RANK": ranks, "STATE": state, "ADJACENT": pairing == "adjacent"
        }  # fmt: skip
        device, name = device_properties(b.device.index), dtype_name(b.dtype)
        tile = FORWARD.tile(device, constants, name)
        chunks = triton.cdiv(length, tile.constants["BLOCK_T"])
        grid = (documents * chunks * heads,)
        totals = torch.empty((documents, chunks, heads, angles), dtype=torch.float64, device=b.device)
        totals_tile = TOTALS.tile(device, phase_constants, "fp32")
        _totals[grid](
            phase_step, rate, totals, starts, lengths, length, chunks, **phase_constants, **totals_tile.launch()
        )
        # (documents, 1, heads, angles), and of every chunk: the phase before it
        start = 0.0 if initial_angle is None else initial_angle.double()[:, None]
        through = totals.cumsum(1) + start
        before = through - totals
        q, k = (torch.empty((batch_size, length, ranks, heads, state), dtype=b.dtype, device=b.device) for _ in "qk")
        _forward[grid](
            b, c, before, phase_step, rate, *weights, k, q, starts, lengths, length, chunks, epsilon,
            **constants, **tile.launch(),
        )  # fmt: skip
        last = through[:, -1]
        angle = (last - 2 * math.pi * (last / (2 * math.pi)).round()).float()
        if lengths is not None and initial_angle is not None:  # an unused slot keeps what it had, unreduced
            angle = torch.where((lengths > 0)[:, None, None], angle, initial_angle)
        ctx.save_for_backward(*tensors, before, starts, lengths)
        ctx.options = constants, epsilon, chunks, initial_angle is not None
        return q, k, angle

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_angle: Tensor) -> tuple[Tensor | None, ...]:
        b, c, phase_step, rate, *weights, before, starts, lengths = ctx.saved_tensors
        constants, epsilon, chunks, has_initial = ctx.options
        documents, _, heads, angles = before.shape
        groups, ranks, state = constants["GROUPS"], constants["RANK"], constants["STATE"]
        length = b.shape[1]
        # With documents, padding and chunks behind a document's end are never written.
        make = torch.empty_like if starts is None else torch.zeros_like
        grad_b, grad_c, grad_step, grad_rate = (make(x) for x in (b, c, phase_step, rate))
        slots = documents * chunks
        weight_parts = [b.new_empty((slots, groups * ranks, state), dtype=torch.float32) for _ in "bc"]
        bias_parts = [b.new_empty((slots, heads, ranks, state), dtype=torch.float32) for _ in "bc"]
        grad_phase = b.new_empty((*phase_step.shape, angles), dtype=torch.float32)
        grad_total = torch.empty_like(before)
        device = device_properties(b.device.index)
        tile = BACKWARD.tile(device, constants, dtype_name(b.dtype))
        _backward[(slots * groups,)](
            b, c, before, phase_step, rate, *weights, grad_k.contiguous(), grad_q.contiguous(),
            grad_b, grad_c, *weight_parts, *bias_parts, grad_phase, grad_total,
            starts, lengths, length, chunks, epsilon, **constants, **tile.launch(),
        )  # fmt: skip
        through = grad_total.flip(1).cumsum(1).flip(1) + grad_angle.double()[:, None]
        phase_constants = {name: constants[name] for name in ("HEADS", "ANGLES", "HALF")}
        phase_tile = PHASE_BACKWARD.tile(device, phase_constants, "fp32")
        _phase_backward[(slots,)](
            grad_phase, through - grad_total, phase_step, rate, grad_step, grad_rate, starts, lengths, length, chunks,
            **phase_constants, **phase_tile.launch(),
        )  # fmt: skip
        grad_weights = [part.sum((0, 1)) for part in weight_parts] + [part.sum(0) for part in bias_parts]
        grad_initial = through[:, 0].float() if has_initial else None
        return grad_b, grad_c, grad_step, grad_rate, *grad_weights, grad_initial, None, None, None, None
