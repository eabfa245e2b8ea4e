"""S4D (arXiv 2206.11893): a diagonal state-space layer run as a convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqmodels.configuration import nearest
from seqmodels.init import DiagonalSystem
from seqmodels.layout import Layout
from seqmodels.mixers.base import MixerOutput, check_divides, check_positive
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
from seqmodels.mixers.state_space import (
    StateSpaceMixer,
    check_steps,
    eigenvalues_of,
    fill_eigenvalues,
    initial_system,
)
from seqmodels.ops.diagonal_ssm import diagonal_ssm, diagonal_ssm_step, pays_off
from seqmodels.ops.long_conv import long_conv
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.vandermonde import diagonal_final_state, diagonal_response, vandermonde
from seqmodels.state import State


class S4DState(State):
    """Attribute ssm: (batch or documents, d_model, modes, 2), real and imaginary part last."""

    ssm: Tensor


class Recurrence(NamedTuple):
    """x[t] = e^z x[t-1] + b u[t], y = scale Re(c x): z, b (heads, modes, 2), c (rows, heads, modes, 2); float64."""

    z: Tensor
    b: Tensor
    c: Tensor


class S4D(StateSpaceMixer):
    r"""One diagonal SSM a channel h, the same map as a convolution and as a recurrence:

    .. code-block:: text

        x' = A x + B u,   y = 2 Re(C x) + D u        A, B, C complex, d_state / 2 modes (conjugates left out)
        K[l] = 2 Re sum_n C_n B'_n e^{l z_n},        y = K * u + D u
        x[t] = e^z x[t-1] + B' u[t],                 y[t] = 2 Re(C x[t]) + D u[t]

    with z and B' from A, B and the step dt of the channel (:func:`~seqmodels.mixers.discretization.discretize`).
    Inits "real" and "ptd" have d_state modes and no factor of 2, nor has the softmax rule. Bidirectional layers add
    sum_j K'[j] u[t + 1 + j] with a C of its own. Section 3 and 4 of Gu, Gupta, Goel and Ré.

    Computed as a convolution by FFT, or as the recurrence where that is faster
    (:func:`~seqmodels.ops.diagonal_ssm.pays_off`): the same map to rounding, with the same states.

    In evaluation without gradients the kernel is computed once for a set of parameters (see
    :class:`~seqmodels.mixers.evaluation_cache.EvaluationCache`; after a write through ``parameter.data`` call
    ``eval()`` again).

    Args:
        d_model: channels; each has its own step, C and D.
        d_state: N, counting conjugates.
        init: "legs", "inv", "lin", "real" or "ptd".
        b_half, b_clip: see :func:`seqmodels.init.diagonal_system`; by default what the published experiments had.
        discretization: "zoh", "bilinear" or "softmax" (DSS).
        softmax_length: the length over which "softmax" normalises; needed by it alone.
        real_part: -Re A is exp(p), relu(p) + 1e-4, softplus(p), p ("free", which may grow) or max(p, 1e-4) ("clip").
        dt_min, dt_max: steps start log-uniform between them.
        dt_activation: steps are exp(p) or softplus(p).
        n_ssm: distinct (A, B), which channels take in turn; must divide d_model.
        channels: outputs for each input channel; more than one are mixed to d_model by ``out_proj``.
        bidirectional: see both ways; no state and no step.
        rate: factor on every step, which may be set later (``layer.rate = 2.0``).
        learning_rates: upper bounds by parameter name, over 1e-3 for log_dt, A_real, A_imag and B; null: the
            global one; 0 keeps a parameter as it is.
        weight_decays: by parameter name, over 0 for those four; null: the global one.

    Raises:
        ValueError: an odd d_state where modes are paired, unknown names, dt_min >= dt_max, a state or step of a
            bidirectional layer.
    """

    exactly_causal = False

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: str = "legs",
        b_half: bool = False,
        b_clip: float | None = 2.0,
        discretization: Discretization = "zoh",
        softmax_length: int | None = None,
        real_part: RealPart = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_activation: Positive = "exp",
        n_ssm: int = 1,
        channels: int = 1,
        bidirectional: bool = False,
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
        name = type(self).__name__
        check_positive(name, d_state=d_state, channels=channels)
        check_divides(name, "n_ssm", n_ssm, "d_model", d_model)
        check_steps(name, dt_min, dt_max, dt_activation, real_part)
        _check_rule(name, discretization, softmax_length)
        self.d_state, self.init, self.n_ssm, self.channels = d_state, init, n_ssm, channels
        self.discretization, self.softmax_length = discretization, softmax_length
        self.real_part, self.dt_activation, self.dt_range = real_part, dt_activation, (dt_min, dt_max)
        self._legs_b = (b_half, b_clip)
        system = self._initial_system()
        modes = system.a.shape[0]
        self.scale = 2.0 if system.paired and discretization != "softmax" else 1.0
        wide = {"device": device, "dtype": state_dtype(torch.get_default_dtype() if dtype is None else dtype)}
        rows = channels * (2 if bidirectional else 1)
        self.log_dt = nn.Parameter(torch.empty(d_model, **wide))
        self.A_real = nn.Parameter(torch.empty(n_ssm, modes, **wide))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, modes, **wide))
        self.B = nn.Parameter(torch.empty(n_ssm, modes, 2, **wide)) if self._trains_b() else None
        self.C = nn.Parameter(torch.empty(rows, d_model, modes, 2, **wide))
        self.D = nn.Parameter(torch.empty(channels, d_model, **wide))
        if channels > 1:
            self.out_proj = nn.Linear(channels * d_model, d_model, device=device, dtype=dtype)
        self._add_parameters(modes, wide)
        self._set_hints()
        self.reset_parameters()

    def _initial_system(self) -> DiagonalSystem:
        half, clip = self._legs_b
        return initial_system(type(self).__name__, self.init, self.d_state, b_half=half, b_clip=clip)

    def _trains_b(self) -> bool:
        return True

    def _add_parameters(self, modes: int, made: dict[str, Any]) -> None:
        """Where a relative of this layer registers what it has besides."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B of the init, steps log-uniform, C complex normal with E|C|^2 = 1, D normal."""
        system = self._initial_system()
        log_uniform(self.log_dt, *self.dt_range, self.dt_activation)
        fill_eigenvalues(self.A_real, self.A_imag, system.a, self.real_part)
        if self.B is not None:
            self.B.copy_(torch.view_as_real(system.b).expand_as(self.B))
        self.C.normal_(std=0.5**0.5)
        self.D.normal_()
        if self.channels > 1:
            self.out_proj.reset_parameters()

    def recurrence(self) -> Recurrence:
        """The discrete system from the parameters, differentiable."""
        dt = STEPS[self.dt_activation][0](self.log_dt.double()) * self.rate
        copies = self.d_model // self.n_ssm
        a = eigenvalues_of(self.A_real, self.A_imag, self.real_part).repeat(copies, 1, 1)
        z, factor = discretize(a, dt[:, None], self.discretization, softmax_length=self.softmax_length)
        b = factor if self.B is None else multiply(factor, self.B.double().repeat(copies, 1, 1))
        return Recurrence(z, b, self.C.double())

    def kernel(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(channels, d_model, length) convolution kernels, D at time 0 included; twice the channels when
        bidirectional, the reversed ones behind."""
        return self._kernel(self.recurrence(), length, dtype)

    def _kernel(self, system: Any, length: int, dtype: torch.dtype) -> Tensor:
        weight = multiply(system.c, system.b).to(dtype)
        return self._with_skip(vandermonde(system.z, weight, length, scale=self.scale), dtype)

    def _with_skip(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        """Adds D to the forward kernels' first tap."""
        skip = self.D.to(dtype)
        if self.bidirectional:
            skip = torch.cat((skip, torch.zeros_like(skip)))
        return torch.cat((kernel[..., :1] + skip[..., None], kernel[..., 1:]), -1)

    def _cached(self, length: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
        """System and kernel, from the cache where there is one; a longer kernel serves shorter sequences."""

        def compute() -> tuple[Any, Tensor]:
            system = self.recurrence()
            return system, self._kernel(system, length, dtype)

        system, kernel = self._cache.get(
            "kernel", self._system_parameters(), (dtype, self.rate), compute,
            serves=lambda value: value[1].shape[-1] >= length,
        )  # fmt: skip
        return system, kernel if kernel.shape[-1] == length else kernel[..., :length]

    def _system_parameters(self) -> list[Tensor]:
        return [p for p in (self.log_dt, self.A_real, self.A_imag, self.B, self.C, self.D) if p is not None]

    def forward(
        self,
        x: Tensor,
        state: S4DState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self._check_call(x, state, layout, return_state)
        u = x.to(state_dtype(x.dtype))
        length = x.shape[1]
        before = None if state is None else state.ssm
        if self._scans(u, layout):
            y, final = self._scan(u, before, layout)
            after = S4DState(final) if return_state and final is not None else None
            return MixerOutput(self._mix(y.to(x.dtype)), after)
        system, kernel = self._cached(length, u.dtype)
        forward_kernel, reverse_kernel = (kernel, None) if not self.bidirectional else kernel.chunk(2)
        y, _ = long_conv(u, forward_kernel, reverse_kernel=reverse_kernel, layout=layout)
        if before is not None:
            y = y + self._response(system, before, length, layout)
        after = S4DState(self._final(system, u, before, layout)) if return_state else None
        return MixerOutput(self._mix(y.to(x.dtype)), after)

    def _scans(self, u: Tensor, layout: Layout | None) -> bool:
        """Whether the recurrence itself runs, where it takes less time than its convolution kernel and transforms."""
        return pays_off(u, self.A_real.shape[1], self.C.shape[0], layout)

    def _scan(self, u: Tensor, before: Tensor | None, layout: Layout | None) -> tuple[Tensor, Tensor | None]:
        """(batch, length, channels, d_model), and the last state."""
        z, b, c = self._cache.get(
            "scan", self._system_parameters(), (u.dtype, self.rate), lambda: self._scan_system(u.dtype)
        )
        if not self.bidirectional:
            return diagonal_ssm(u, z, b, c, skip=self.D.to(u.dtype), initial_state=before, layout=layout)
        forward, backward = c.chunk(2)
        y, _ = diagonal_ssm(u, z, b, forward, skip=self.D.to(u.dtype), layout=layout)
        return y + diagonal_ssm(u, z, b, backward, layout=layout, reverse=True)[0], None

    def _scan_system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """z, b, and scale c."""
        z, b, c = self.recurrence()
        return z, b.to(dtype), (self.scale * c).to(dtype)

    def _final(self, system: Any, u: Tensor, before: Tensor | None, layout: Layout | None) -> Tensor:
        return diagonal_final_state(system.z, u, input_weight=system.b, initial_state=before, layout=layout)

    def _response(self, system: Any, before: Tensor, length: int, layout: Layout | None) -> Tensor:
        """What the initial state adds: (batch, length, channels, d_model)."""
        seen = multiply(system.c, exponential(system.z))
        rows = [
            diagonal_response(
                system.z, multiply(row, before.double()).to(before.dtype), length, scale=self.scale, layout=layout
            )
            for row in seen
        ]
        return torch.stack(rows, 2)

    def _mix(self, y: Tensor) -> Tensor:
        """(..., channels, d_model) to (..., d_model)."""
        return self.out_proj(y.flatten(-2)) if self.channels > 1 else y.squeeze(-2)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: S4DState) -> Tensor:
        if self.bidirectional:
            self._refuse_state("take single steps")
        u = x_t.to(state_dtype(x_t.dtype))
        decay, b, c = self._cache.get(
            "step", self._system_parameters(), (u.dtype, self.rate), lambda: self._step_system(u.dtype)
        )
        y = diagonal_ssm_step(decay, b, c, self.D.to(u.dtype), u, state.ssm)
        return self._mix(y.to(x_t.dtype))

    def _step_system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """e^z, b, and scale (Re c, -Im c), so that y is a real sum."""
        z, b, c = self.recurrence()
        signed = torch.stack((c[..., 0], -c[..., 1]), -1) * self.scale
        return exponential(z).to(dtype), b.to(dtype), signed.to(dtype)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S4DState:
        """Zeros in float32 (float64 beside float64), whatever the context length."""
        if self.bidirectional:
            self._refuse_state("carry a state")
        return S4DState(
            torch.zeros(
                batch_size,
                *self.C.shape[1:],
                dtype=state_dtype(self.C.dtype if dtype is None else dtype),
                device=self.C.device if device is None else device,
            )
        )

    def flops(self, length: int) -> int:
        """The recurrence's: 8 operations for a complex update, 4 for each output, a mode and token."""
        modes = self.C.shape[2]
        return super().flops(length) + length * self.d_model * modes * (8 + 4 * self.C.shape[0])

    def extra_repr(self) -> str:
        return f"d_state={self.d_state}, init={self.init!r}, {self.discretization}, bidirectional={self.bidirectional}"


def _check_rule(owner: str, rule: str, softmax_length: int | None) -> None:
    known = ("zoh", "bilinear", "softmax")
    if rule not in known:
        raise ValueError(f"{owner}: unknown discretization {rule!r}.{nearest(rule, known)} Known: {', '.join(known)}")
    if (rule == "softmax") != (softmax_length is not None):
        raise ValueError(
            f"{owner}: discretization {rule!r} with softmax_length={softmax_length}; softmax needs the length that it "
            "normalises over (the longest training sequence), the other rules take none"
        )
    if softmax_length is not None:
        check_positive(owner, softmax_length=softmax_length)
