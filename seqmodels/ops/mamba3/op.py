"""The public function of Mamba-3's recurrence: equation, checks, casts and dispatch.

The op spans everything between the layer's two projections that runs along the sequence: norm and
bias of B and C, rotation, trapezoid weights, recurrence, skip, gate and the sum over ranks. An
implementation may therefore fuse all of it and keep nothing but the inputs for its backward. What
it gets is already activated (dt > 0, log_decay <= 0, trapezoid in (0, 1), rate in rad per unit of
dt), so that an implementation holds no choice of activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator, cast_inputs, state_dtype
from seqmodels.state import State

_PACKAGE = "seqmodels.ops.mamba3"
PAIRINGS = ("adjacent", "half")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Mamba3State(State):
    """What one Mamba-3 recurrence carries, zero before the first token; D is the batch or the documents.

    Attributes:
        angle: (D, heads, angles), the phase of every head mod 2 pi.
        ssm: (D, heads, head_dim, d_state).
        k: (D, ranks, heads, d_state), the last token's key: normed, biased and rotated, not weighted.
        v: (D, heads, head_dim), the last token's x, before mimo_x.
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor

    def canonical(self) -> Mamba3State:
        """Phases in [-1, 2 pi - 1): the seam lies away from 0 and pi, where constructed weights rotate to."""
        period = 2 * torch.pi
        return Mamba3State((self.angle + 1).remainder(period) - 1, self.ssm, self.k, self.v)


def mamba3(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    trapezoid: Tensor,
    rate: Tensor,
    *,
    b_weight: Tensor,
    c_weight: Tensor,
    b_bias: Tensor,
    c_bias: Tensor,
    skip: Tensor,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    norm_weight: Tensor | None = None,
    phase_step: Tensor | None = None,
    initial_state: Mamba3State | None = None,
    layout: Layout | None = None,
    pairing: str = "adjacent",
    epsilon: float = 1e-5,
    chunk_size: int = 64,
) -> tuple[Tensor, Mamba3State]:
    r"""Mamba-3 from its projections to its gated output (arXiv 2603.15569, sections 3.1 to 3.3).

    For one head, with a_t = e^{log_decay_t}, D_t = dt_t, l_t = trapezoid_t, and v_t,r = mimo_x_r x_t:

    .. code-block:: text

        phi_t = phi_{t-1} + phase_step_t rate_t
        k_t,r = rotate(phi_t, RMSNorm(b_t,r) b_weight + b_bias_r),   q_t,r from c likewise
        S_t   = a_t S_{t-1} + (1 - l_t) D_t a_t sum_r v_{t-1},r k_{t-1},r^T + l_t D_t sum_r v_t,r k_t,r^T
        y_t,r = S_t q_t,r + skip v_t,r                               [RMSNorm over the head, norm_weight]
        out_t = sum_r mimo_o_r y_t,r silu(mimo_z_r z_t)

    ``rotate`` turns lane pair (u, w) number i of the N lanes by phi_t[i], to
    (u cos - w sin, u sin + w cos); lanes without an angle pass through. All rank pairs interact
    through S, whose size does not depend on R. Without the three ``mimo`` weights (SISO, R = 1)
    they count as 1.

    Shapes: B rows, L tokens, R ranks, G groups, H heads, N state width, P head width, A angles.

    Args:
        x, z: (B, L, H, P). b, c: (B, L, R, G, N); head h reads group h * G // H. Matrix products
            run in their dtype (under autocast, in autocast's), sums in float32.
        dt, log_decay, trapezoid: (B, L, H) float32 (float64 beside float64 x), with dt >= 0,
            log_decay = dt * a <= 0 and trapezoid in [0, 1].
        rate: (B, L, A), shared by the heads; A at most N // 2.
        b_weight, c_weight: (N). b_bias, c_bias: (H, R, N). skip: (H).
        mimo_x, mimo_z, mimo_o: (H, R, P), all or none.
        norm_weight: (H * P) or None. When given, y is normed over each head's P and scaled
            before the gate.
        phase_step: (B, L, H). None: dt, so that the rotation is data-dependent. Ones give
            rotary positions of a fixed rate.
        initial_state: what an earlier call or decode step left; one row a document.
        layout: documents. None: one document a row.
        pairing: "adjacent" pairs lanes (2i, 2i + 1), "half" pairs (i, i + N // 2).
        epsilon: of the norms.
        chunk_size: rows (tokens x ranks) of a chunk in the PyTorch form; kernels choose their own.

    Returns:
        (B, L, H, P) of x's dtype, zero outside documents, and the state behind each document's
        last token: from there ``mamba3`` and decode steps continue alike, at any cut. The phase
        is summed without loss and reduced mod 2 pi.

    Raises:
        ValueError: shapes that do not fit together, an unknown pairing, a state of another size.
        TypeError: mixed or unsupported dtypes.
    """
    x, b, c, z = cast_inputs(x, b, c, z)
    phase_step = dt if phase_step is None else phase_step
    documents = x.shape[0] if layout is None else layout.num_documents
    heads = _check_inputs(x, b, c, z, rate, pairing, chunk_size)
    batch_size, length, ranks, _, d_state = b.shape
    head_dim = x.shape[-1]
    if layout is not None and layout.document.shape != (batch_size, length):
        raise ValueError(
            f"mamba3: layout is for a grid of {tuple(layout.document.shape)}; "
            f"x is {(batch_size, length)} (batch, length)"
        )
    given = [mix is not None for mix in (mimo_x, mimo_z, mimo_o)]
    if any(given) and not all(given):
        raise ValueError("mamba3: mimo_x, mimo_z and mimo_o come together; give all three or none (SISO)")
    if ranks > 1 and not all(given):
        raise ValueError(
            f"mamba3: b has {ranks} ranks; MIMO needs mimo_x, mimo_z and mimo_o of (heads, {ranks}, head_dim)"
        )
    wide = state_dtype(x.dtype)
    token = (batch_size, length, heads)
    mix = (heads, ranks, head_dim)
    wanted = {
        "dt": (dt, token),
        "log_decay": (log_decay, token),
        "trapezoid": (trapezoid, token),
        "phase_step": (phase_step, token),
        "rate": (rate, (batch_size, length, rate.shape[-1])),
        "b_weight": (b_weight, (d_state,)),
        "c_weight": (c_weight, (d_state,)),
        "b_bias": (b_bias, (heads, ranks, d_state)),
        "c_bias": (c_bias, (heads, ranks, d_state)),
        "skip": (skip, (heads,)),
        "mimo_x": (mimo_x, mix),
        "mimo_z": (mimo_z, mix),
        "mimo_o": (mimo_o, mix),
        "norm_weight": (norm_weight, (heads * head_dim,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"mamba3: {name} has shape {tuple(tensor.shape)}; expected {shape}")
    floats = [None if tensor is None else tensor.to(wide) for tensor, _ in wanted.values()]
    carried: list[Tensor | None] = [None] * 4
    if initial_state is not None:
        shapes = state_shapes(documents, heads, head_dim, d_state, ranks, rate.shape[-1])
        for field, shape in shapes.items():
            tensor = getattr(initial_state, field)
            if tensor.shape != shape or tensor.dtype != wide:
                raise ValueError(
                    f"mamba3: state field {field!r} is {tuple(tensor.shape)} {tensor.dtype}; expected {shape} {wide}"
                )
        carried = [getattr(initial_state, field) for field in shapes]
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    out, *after = _operator(x, b, c, z, *floats, *carried, starts, lengths, pairing, epsilon, chunk_size)
    return out, Mamba3State(*after)


def state_shapes(
    documents: int, heads: int, head_dim: int, d_state: int, ranks: int, angles: int
) -> dict[str, tuple[int, ...]]:
    """Shape of every field of :class:`Mamba3State`."""
    return {
        "angle": (documents, heads, angles),
        "ssm": (documents, heads, head_dim, d_state),
        "k": (documents, ranks, heads, d_state),
        "v": (documents, heads, head_dim),
    }


def _check_groups(owner: str, groups: int, heads: int) -> None:
    if groups < 1 or heads % groups:
        raise ValueError(f"{owner}: {groups} groups do not divide the {heads} heads; choose a divisor of {heads}")


def _check_inputs(x: Tensor, b: Tensor, c: Tensor, z: Tensor, rate: Tensor, pairing: str, chunk_size: int) -> int:
    """Refuses wrong ranks, dtypes and options; returns the number of heads."""
    for name, tensor, axes in (
        ("x", x, "(batch, length, heads, head_dim)"),
        ("z", z, "(batch, length, heads, head_dim)"),
        ("b", b, "(batch, length, ranks, groups, d_state)"),
        ("c", c, "(batch, length, ranks, groups, d_state)"),
        ("rate", rate, "(batch, length, angles)"),
    ):
        if tensor.dim() != axes.count(",") + 1:
            raise ValueError(f"mamba3: {name} has shape {tuple(tensor.shape)}; expected {axes}")
    if x.dtype not in FLOATS or not x.dtype == b.dtype == c.dtype == z.dtype:
        raise TypeError(
            f"mamba3: x, b, c, z are {x.dtype}, {b.dtype}, {c.dtype}, {z.dtype}; "
            "expected one floating-point dtype for all"
        )
    if z.shape != x.shape or b.shape != c.shape or b.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"mamba3: x {tuple(x.shape)}, z {tuple(z.shape)}, b {tuple(b.shape)}, c {tuple(c.shape)} do not fit "
            "together; expected equal x and z, equal b and c, and one batch and length"
        )
    if x.shape[1] < 1:
        raise ValueError(f"mamba3: x has length 0 (shape {tuple(x.shape)}); expected at least one token")
    _check_groups("mamba3", b.shape[3], x.shape[2])
    if rate.shape[-1] > b.shape[-1] // 2:
        raise ValueError(
            f"mamba3: {rate.shape[-1]} angles for d_state={b.shape[-1]}; an angle turns a pair of lanes, "
            f"so at most {b.shape[-1] // 2}"
        )
    if pairing not in PAIRINGS:
        raise ValueError(f"mamba3: pairing is {pairing!r}; expected one of {', '.join(map(repr, PAIRINGS))}")
    if chunk_size < 1:
        raise ValueError(f"mamba3: chunk_size is {chunk_size}; expected a positive integer")
    return x.shape[2]


def _fake(x: Tensor, b: Tensor, c: Tensor, z: Tensor, dt: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    rate, starts = rest[3], rest[17]
    documents = x.shape[0] if starts is None else starts.shape[0]
    shapes = state_shapes(documents, x.shape[2], x.shape[3], b.shape[-1], b.shape[2], rate.shape[-1])
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *(dt.new_empty(shape) for shape in shapes.values()),
    )


_operator = Operator(
    "mamba3",
    "Tensor x, Tensor b, Tensor c, Tensor z, Tensor dt, Tensor log_decay, Tensor trapezoid, Tensor phase_step, "
    "Tensor rate, Tensor b_weight, Tensor c_weight, Tensor b_bias, Tensor c_bias, Tensor skip, "
    "Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight, "
    "Tensor? initial_angle, Tensor? initial_ssm, Tensor? initial_k, Tensor? initial_v, "
    "Tensor? starts, Tensor? lengths, str pairing, float epsilon, SymInt chunk_size",
    outputs=5,
    fake=_fake,
    modules={
        "reference": f"{_PACKAGE}.reference",
        "torch": f"{_PACKAGE}.torch",
        "cpu": f"{_PACKAGE}.cpu",
        "triton": f"{_PACKAGE}.triton",
    },
    differentiable=tuple(range(22)),
)
