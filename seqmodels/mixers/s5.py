"""S5 (arXiv 2208.04933): one state-space system with all channels in and out, run as a scan."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.configuration import nearest
from seqmodels.init import legs, legs_normal, perturbed_legs
from seqmodels.layout import Layout
from seqmodels.mixers.base import MixerOutput, check_divides
from seqmodels.mixers.discretization import (
    STEPS,
    Discretization,
    Positive,
    RealPart,
    discretize,
    exponential,
    log_uniform,
    multiply,
)
from seqmodels.mixers.gating import GATES, GatedActivation
from seqmodels.mixers.state_space import (
    StateSpaceMixer,
    check_steps,
    eigenvalues_of,
    fill_eigenvalues,
    ptd_settings,
)
from seqmodels.ops.linear_recurrence import linear_recurrence, linear_recurrence_step
from seqmodels.ops.long_conv import long_conv
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.vandermonde import diagonal_final_state, diagonal_response, vandermonde
from seqmodels.state import State

ACTIVATIONS = ("none", "gelu", *GATES)
_CHOICES = {
    "init": ("legs", "ptd"),
    "b_init": ("lecun", "legs"),
    "c_init": ("lecun", "truncated_normal", "complex_normal"),
    "mode": ("scan", "convolution"),
    "discretization": ("zoh", "bilinear"),
    "activation": ACTIVATIONS,
}


class S5State(State):
    """Attribute ssm: (batch or documents, modes, 2), real and imaginary part last."""

    ssm: Tensor


class S5(StateSpaceMixer):
    r"""One state of P complex numbers for all channels:

    .. code-block:: text

        x[t] = e^z x[t-1] + ((e^z - 1) / A * B) u[t],   z = dt A        A, dt (modes,), B (modes, d_model)
        y[t] = 2 Re(C x[t]) + D u[t],   out = activation(y)             C (d_model, modes)

    A is block diagonal in its first basis: ``num_blocks`` blocks of LegS of size N = d_state / num_blocks. "legs"
    keeps one of each conjugate pair of the normal part's eigenvalues (d_state / 2 modes); "ptd" has all d_state modes
    of LegS + E and no factor of 2. Bidirectional layers run a second scan from each document's end, with a C of its
    own. Section 3 of Smith, Warrington and Linderman; "ptd": Yu et al., arXiv 2310.01698.

    Args:
        d_model: H.
        d_state: P, before one of each conjugate pair is left out.
        num_blocks: J; must divide d_state.
        init: "legs" or "ptd".
        perturbation_weight: see :class:`~seqmodels.mixers.s4_ptd.S4PTD`.
        force_negative: start from -|Re A|, where a perturbation is not stable.
        b_init: "lecun": V^-1 B_0, entries of B_0 (P x H) of variance 1 / P; "legs": each of its columns is LegS's B.
        c_init: C_0 V, entries of C_0 (H x P) of variance 1 / (P H) in each part ("lecun") or 1 / P
            ("truncated_normal"); or C itself of variance 1/2 in each part ("complex_normal").
        discretization: "zoh" or "bilinear".
        real_part: -Re A as a function of its parameter p: p ("free"), max(p, 1e-4) ("clip"), or S4D's "exp", "relu"
            and "softplus".
        dt_min, dt_max, dt_activation, rate, learning_rates, weight_decays: see :class:`~seqmodels.mixers.s4d.S4D`;
            here each mode has its own step.
        bidirectional: see both ways; no state and no step.
        mode: "scan", or "convolution": the same states by FFT.
        activation: "none", "gelu", "full_glu", "half_glu1" or "half_glu2"
            (:class:`~seqmodels.mixers.gating.GatedActivation`).
        dropout, dropout_tied: after the activation's GELU.

    Raises:
        ValueError: sizes that do not divide, an odd block for "legs", unknown names, dt_min >= dt_max, a state or
            step of a bidirectional layer.
    """

    residual_outputs = ("activation.proj.weight",)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        num_blocks: int = 1,
        init: Literal["legs", "ptd"] = "legs",
        perturbation_weight: float | None = None,
        force_negative: bool = False,
        b_init: Literal["lecun", "legs"] = "lecun",
        c_init: Literal["lecun", "truncated_normal", "complex_normal"] = "lecun",
        discretization: Discretization = "zoh",
        real_part: RealPart = "free",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_activation: Positive = "exp",
        bidirectional: bool = False,
        mode: Literal["scan", "convolution"] = "scan",
        activation: Literal["none", "gelu", "full_glu", "half_glu1", "half_glu2"] = "half_glu1",
        dropout: float = 0.0,
        dropout_tied: bool = False,
        rate: float = 1.0,
        learning_rates: dict[str, float | None] | None = None,
        weight_decays: dict[str, float | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            bidirectional=bidirectional,
            rate=rate,
            learning_rates=learning_rates,
            weight_decays=weight_decays,
        )
        check_divides("S5", "num_blocks", num_blocks, "d_state", d_state)
        check_steps("S5", dt_min, dt_max, dt_activation, real_part)
        chosen = dict(
            init=init, b_init=b_init, c_init=c_init, mode=mode, discretization=discretization, activation=activation
        )
        for name, value in chosen.items():
            if value not in _CHOICES[name]:
                near = nearest(value, _CHOICES[name])
                raise ValueError(f"S5: unknown {name} {value!r}.{near} Known: {', '.join(_CHOICES[name])}")
        if activation in ("none", "gelu") and dropout:
            raise ValueError(f"S5: dropout={dropout} belongs to the gated activations; activation is {activation!r}")
        self.d_state, self.num_blocks, self.init, self.mode = d_state, num_blocks, init, mode
        self.exactly_causal = mode == "scan"  # type: ignore[misc]
        self._inits = (b_init, c_init, force_negative, perturbation_weight)
        self.discretization, self.real_part = discretization, real_part
        self.dt_activation, self.dt_range = dt_activation, (dt_min, dt_max)
        self.scale = 2.0 if init == "legs" else 1.0
        modes = self._block()[0].shape[0] * num_blocks
        wide = {"device": device, "dtype": state_dtype(torch.get_default_dtype() if dtype is None else dtype)}
        directions = 2 if bidirectional else 1
        self.log_dt = nn.Parameter(torch.empty(modes, **wide))
        self.A_real = nn.Parameter(torch.empty(modes, **wide))
        self.A_imag = nn.Parameter(torch.empty(modes, **wide))
        self.B = nn.Parameter(torch.empty(modes, d_model, 2, **wide))
        self.C = nn.Parameter(torch.empty(directions, d_model, modes, 2, **wide))
        self.D = nn.Parameter(torch.empty(d_model, **wide))
        self._set_hints()
        if activation in GATES:
            self.activation = GatedActivation(
                d_model, activation, dropout=dropout, dropout_tied=dropout_tied, device=device, dtype=dtype
            )
        else:
            self.activation = nn.GELU() if activation == "gelu" else nn.Identity()
        self.reset_parameters()

    def _block(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues (m,), V (N, m) and its (left) inverse (m, N) of one block."""
        size = self.d_state // self.num_blocks
        if self.init == "legs":
            normal = legs_normal(size)
            eigenvalues = torch.complex(torch.full_like(normal.frequencies, -0.5), normal.frequencies)
            return eigenvalues, normal.vectors, normal.vectors.mH
        _, _, force_negative, weight = self._inits
        found = perturbed_legs(size, ptd_settings(size, weight))
        real = found.eigenvalues.real
        return (
            torch.complex(-real.abs() if force_negative else real, found.eigenvalues.imag),
            found.vectors,
            found.inverse,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values; D normal."""
        log_uniform(self.log_dt, *self.dt_range, self.dt_activation)
        eigenvalues, vectors, inverse = self._block()
        fill_eigenvalues(self.A_real, self.A_imag, eigenvalues.repeat(self.num_blocks), self.real_part)
        self.D.normal_()
        if isinstance(self.activation, GatedActivation):
            self.activation.proj.reset_parameters()
        if self.B.is_meta:
            return
        b_init, c_init, _, _ = self._inits
        size, blocks, width = self.d_state // self.num_blocks, self.num_blocks, self.d_model
        if b_init == "legs":
            b = legs(size)[1][:, None].expand(size, width).repeat(blocks, 1)
        else:
            b = _truncated_normal(self.d_state, width, std=self.d_state**-0.5, like=self.B)
        b = torch.cat([inverse @ part for part in b.to(torch.complex128).split(size)])
        self.B.copy_(torch.view_as_real(b))
        if c_init == "complex_normal":
            self.C.normal_(std=0.5**0.5)
            return
        std = (self.d_state * (width if c_init == "lecun" else 1)) ** -0.5
        parts = [_truncated_normal(*self.C.shape[:2], self.d_state, std=std, like=self.C) for _ in range(2)]
        c = torch.cat([part @ vectors for part in torch.complex(*parts).split(size, dim=-1)], -1)
        self.C.copy_(torch.view_as_real(c))

    def recurrence(self) -> tuple[Tensor, Tensor]:
        """z (modes, 2) and the discretised B (modes, d_model, 2) in float64, differentiable."""
        dt = STEPS[self.dt_activation][0](self.log_dt.double()) * self.rate
        z, factor = discretize(eigenvalues_of(self.A_real, self.A_imag, self.real_part), dt, self.discretization)
        return z, multiply(factor[:, None], self.B.double())

    def forward(
        self,
        x: Tensor,
        state: S5State | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self._check_call(x, state, layout, return_state)
        u = x.to(state_dtype(x.dtype))
        z, b = self.recurrence()
        driven = _driven(u, b)
        run = self._scan if self.mode == "scan" else self._convolve
        states, final = run(z, driven, None if state is None else state.ssm, layout, return_state)
        y = self._seen(states, 0)
        if self.bidirectional:
            order = _backwards(layout, x)
            states, _ = run(z, _reordered(driven, order), None, layout, False)
            y = y + self._seen(_reordered(states, order), 1)
        y = y + self.D.to(u.dtype) * u
        after = S5State(final) if final is not None else None
        return MixerOutput(self.activation(y.to(x.dtype)), after)

    def _scan(
        self, z: Tensor, driven: Tensor, before: Tensor | None, layout: Layout | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        decay = exponential(z).to(driven.dtype)
        states, final = linear_recurrence(decay, driven, initial_state=before, layout=layout)
        return states, final if return_state else None

    def _convolve(
        self, z: Tensor, driven: Tensor, before: Tensor | None, layout: Layout | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The scan's states as convolutions of the driven inputs with e^{l z}, real and imaginary part apart."""
        length, modes, dtype = driven.shape[1], z.shape[0], driven.dtype
        z_M1 = z[:, None]  # one state a head
        unit = z.new_tensor([[1.0, 0.0], [0.0, -1.0]])  # Re(e^{lz}), Re(-i e^{lz}) = Im(e^{lz})
        weight = unit.to(dtype)[:, None, None].expand(2, modes, 1, 2)
        kernel = vandermonde(z_M1, weight, length).repeat_interleave(2, 1)  # (2, modes x parts, length)
        values, _ = long_conv(driven.flatten(2), kernel, layout=layout)
        (rr, ri), (ir, ii) = (part.unflatten(-1, (modes, 2)).unbind(-1) for part in values.unbind(2))
        states = torch.stack((rr - ii, ri + ir), -1)
        if before is not None:
            seen = multiply(exponential(z), before.double())[:, :, None]
            parts = [diagonal_response(z_M1, multiply(turn, seen).to(dtype), length, layout=layout) for turn in unit]
            states = states + torch.stack(parts, -1)
        if not return_state:
            return states, None
        real, imaginary = (
            diagonal_final_state(z_M1, part.contiguous(), layout=layout).squeeze(2) for part in driven.unbind(-1)
        )
        final = real + torch.stack((-imaginary[..., 1], imaginary[..., 0]), -1)
        if before is not None:
            zeros = driven.new_zeros(driven.shape[:3])
            carried = diagonal_final_state(z_M1, zeros, initial_state=before[:, :, None], layout=layout)
            final = final + carried.squeeze(2)
        return states, final

    def _seen(self, states: Tensor, direction: int) -> Tensor:
        """scale Re(C x): (..., modes, 2) to (..., d_model)."""
        c = self.C[direction].to(states.dtype)
        signed = self.scale * torch.stack((c[..., 0], -c[..., 1]), -1)
        return F.linear(states.flatten(-2), signed.flatten(-2))

    @torch.no_grad()
    def step(self, x_t: Tensor, state: S5State) -> Tensor:
        if self.bidirectional:
            self._refuse_state("take single steps")
        u = x_t.to(state_dtype(x_t.dtype))
        parameters = [self.log_dt, self.A_real, self.A_imag, self.B]
        z, b = self._cache.get("step", parameters, (self.rate,), self.recurrence)
        linear_recurrence_step(exponential(z).to(u.dtype), _driven(u, b), state.ssm)
        y = self._seen(state.ssm, 0) + self.D.to(u.dtype) * u
        return self.activation(y.to(x_t.dtype))

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S5State:
        """Zeros in float32 (float64 beside float64), whatever the context length."""
        if self.bidirectional:
            self._refuse_state("carry a state")
        return S5State(
            torch.zeros(
                batch_size,
                self.A_real.shape[0],
                2,
                dtype=state_dtype(self.C.dtype if dtype is None else dtype),
                device=self.C.device if device is None else device,
            )
        )

    def flops(self, length: int) -> int:
        """Projections by B and C, and 8 operations for a complex update, a mode and token."""
        modes, directions = self.A_real.shape[0], self.C.shape[0]
        a_token = modes * (4 * self.d_model + directions * (4 * self.d_model + 8))
        return super().flops(length) + length * a_token

    def extra_repr(self) -> str:
        blocks = f"{self.num_blocks}x{self.d_state // self.num_blocks}"
        return f"d_state={blocks}, init={self.init!r}, {self.mode}, bidirectional={self.bidirectional}"


def _driven(u: Tensor, b: Tensor) -> Tensor:
    """B u: (..., d_model) to (..., modes, 2)."""
    rows = b.to(u.dtype).transpose(1, 2).flatten(0, 1)
    return F.linear(u, rows).unflatten(-1, (-1, 2))


def _backwards(layout: Layout | None, x: Tensor) -> Tensor:
    """Flat index of the token that stands at each token's place when every document is read from its end."""
    batch_size, length = x.shape[:2]
    column = torch.arange(length, device=x.device)
    row = torch.arange(batch_size, device=x.device)[:, None] * length
    if layout is None:
        return row + (length - 1 - column)
    document = layout.document.clamp_min(0)
    mirrored = layout.starts[document] + layout.lengths[document] - 1 - layout.position
    return torch.where(layout.valid, mirrored, row + column)


def _reordered(values: Tensor, order: Tensor) -> Tensor:
    return values.flatten(0, 1)[order.flatten()].view(values.shape)


def _truncated_normal(*shape: int, std: float, like: Tensor) -> Tensor:
    """Normal, cut at two of its standard deviations and scaled so that ``std`` holds after the cut; float64, CPU."""
    inside = math.erf(2**0.5)
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    spread = std / math.sqrt(1 - 4 * density / inside)
    values = torch.empty(shape, device=like.device, dtype=like.dtype)
    return nn.init.trunc_normal_(values, std=spread, a=-2 * spread, b=2 * spread).to("cpu", torch.float64)
