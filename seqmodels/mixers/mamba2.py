"""Mamba-2 (arXiv 2405.21060): state-space duality with a short convolution and a gated norm."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, ParameterHint, check_divides, check_positive
from seqmodels.ops.linear_attention import linear_attention, linear_attention_step
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.short_conv import short_conv, short_conv_step
from seqmodels.ops.token_linear import apply_linear
from seqmodels.state import State

EPSILON = 1e-5


class Mamba2State(State):
    """What one Mamba-2 layer carries, zero before the first token; D is the batch or the documents.

    Attributes:
        conv: (D, d_conv - 1, heads * head_dim + 2 * groups * d_state), the last inputs, oldest first.
        ssm: (D, heads, d_state, head_dim).
    """

    conv: Tensor
    ssm: Tensor


class Mamba2(Mixer):
    r"""The Mamba-2 layer (section 7 of the paper), with the released parameter names.

    .. code-block:: text

        z, xBC, dt' = in_proj(u);   x, B, C = silu(conv1d(xBC));   dt = softplus(dt' + dt_bias)
        S_t = e^{-dt exp(A_log)} S_{t-1} + dt B_t x_t^T,   y_t = C_t S_t + D x_t
        out = out_proj(RMSNorm(y silu(z)) norm.weight),   or of RMSNorm(y) norm.weight silu(z)

    Args:
        d_model: width of the input and output.
        d_state: N, state width of a head.
        d_conv: width of the convolution over x, B and C.
        expand: inner width over d_model.
        head_dim: P; the number of heads is expand * d_model / P.
        num_groups: G, groups of heads that share B and C, and groups of the norm.
        norm_before_gate: the second form of ``out``, which hybrids prefer (Mamba-3, arXiv:2603.15569).
        a_range: exp(A_log) starts uniform in it.
        dt_min, dt_max, dt_init_floor: dt starts log-uniform in [dt_min, dt_max], at least the floor.
    """

    parameter_hints: ClassVar[dict[str, ParameterHint]] = {
        "A_log": ParameterHint(weight_decay=0.0),
        "dt_bias": ParameterHint(weight_decay=0.0),
        "D": ParameterHint(weight_decay=0.0),
    }

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        norm_before_gate: bool = False,
        a_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model)
        check_positive("Mamba2", d_state=d_state, d_conv=d_conv, expand=expand)
        self.inner = expand * d_model
        check_divides("Mamba2", "head_dim", head_dim, "expand * d_model", self.inner)
        self.num_heads = self.inner // head_dim
        check_divides("Mamba2", "num_groups", num_groups, "number of heads", self.num_heads)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba2: dt_min={dt_min} and dt_max={dt_max}; expected 0 < dt_min <= dt_max")
        if not 0 < a_range[0] <= a_range[1]:
            raise ValueError(f"Mamba2: a_range is {a_range}; expected 0 < low <= high")
        self.head_dim, self.d_state, self.num_groups, self.d_conv = head_dim, d_state, num_groups, d_conv
        self.norm_before_gate = norm_before_gate
        self.a_range, self.dt_range = tuple(a_range), (dt_min, dt_max, dt_init_floor)
        self.conv_width = self.inner + 2 * num_groups * d_state
        made = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": state_dtype(torch.get_default_dtype() if dtype is None else dtype)}
        self.in_proj = nn.Linear(d_model, self.inner + self.conv_width + self.num_heads, bias=False, **made)
        self.conv1d = nn.Conv1d(self.conv_width, self.conv_width, d_conv, groups=self.conv_width, **made)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, **wide))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, **wide))
        self.D = nn.Parameter(torch.empty(self.num_heads, **wide))
        self.norm = nn.RMSNorm(self.inner, eps=EPSILON, **made)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values; projections and convolution as torch's own layers do."""
        for layer in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            layer.reset_parameters()
        self.D.fill_(1)
        self.A_log.uniform_(*self.a_range).log_()
        low, high, floor = self.dt_range
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
        self.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())

    def _decay(self, raw_dt: Tensor) -> tuple[Tensor, Tensor]:
        """dt and the log decay, in the state's dtype."""
        wide = state_dtype(raw_dt.dtype)
        dt = F.softplus(raw_dt.to(wide) + self.dt_bias.to(wide))
        return dt, -dt * self.A_log.to(wide).exp()

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, P), B and C (..., G, N) of the convolution's output."""
        keys = self.num_groups * self.d_state
        x, b, c = mixed.split((self.inner, keys, keys), dim=-1)
        groups = (self.num_groups, self.d_state)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def _normed(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, and norm over each group's heads, in the order that was asked for."""
        wide = state_dtype(z.dtype)
        y = y.to(wide) + self.D.to(wide)[:, None] * x.to(wide)
        y, gate = y.flatten(-2), F.silu(z.to(wide))
        grouped = (y if self.norm_before_gate else y * gate).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=EPSILON).flatten(-2) * self.norm.weight.to(wide)
        return (normed * gate if self.norm_before_gate else normed).to(z.dtype)

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        if state is not None:
            self.check_state(state, x.shape[0] if layout is None else layout.num_documents)
        z, mixed, raw_dt = self.in_proj(x).split((self.inner, self.conv_width, self.num_heads), dim=-1)
        mixed, conv = short_conv(
            mixed,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if state is None else state.conv,
            activation="silu",
            layout=layout,
        )
        values, b, c = self._heads(mixed)
        dt, log_decay = self._decay(raw_dt)
        y, ssm = linear_attention(
            c,
            b,
            values,
            log_decay,
            past_weight=dt,
            diagonal_weight=dt,
            initial_state=None if state is None else state.ssm,
            layout=layout,
        )
        return MixerOutput(self.out_proj(self._normed(y, values, z)), Mamba2State(conv, ssm) if return_state else None)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: Mamba2State) -> Tensor:
        z, mixed, raw_dt = apply_linear(self.in_proj, x_t).split((self.inner, self.conv_width, self.num_heads), dim=-1)
        mixed = short_conv_step(mixed, self.conv1d.weight.squeeze(1), self.conv1d.bias, state.conv, activation="silu")
        values, b, c = self._heads(mixed)
        dt, log_decay = self._decay(raw_dt)
        y = linear_attention_step(c, b, values, log_decay, state.ssm, past_weight=dt, diagonal_weight=dt)
        return apply_linear(self.out_proj, self._normed(y, values, z))

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba2State:
        """Zeros in float32 (float64 beside float64), whatever the context length."""
        made = {
            "dtype": state_dtype(self.in_proj.weight.dtype if dtype is None else dtype),
            "device": self.D.device if device is None else device,
        }
        return Mamba2State(
            torch.zeros(batch_size, self.d_conv - 1, self.conv_width, **made),
            torch.zeros(batch_size, self.num_heads, self.d_state, self.head_dim, **made),
        )

    def flops(self, length: int) -> int:
        chunk = 64
        a_head = 2 * chunk * (self.d_state + self.head_dim) + 4 * self.d_state * self.head_dim
        return super().flops(length) + length * (self.num_heads * a_head + 2 * self.conv_width * self.d_conv)

    def extra_repr(self) -> str:
        return (
            f"d_state={self.d_state}, heads={self.num_heads}x{self.head_dim}, groups={self.num_groups}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
