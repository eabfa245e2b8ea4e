"""Mamba-3 (arXiv 2603.15569): trapezoidal discretisation, complex-valued state, SISO and MIMO."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, ParameterHint, check_divides, check_positive
from seqmodels.ops.mamba3 import A_ACTIVATIONS, PAIRINGS, ROTATIONS, Mamba3State, Projection, mamba3, mamba3_step
from seqmodels.ops.mamba3.op import state_shapes
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.token_linear import apply_linear

A_FLOOR = 1e-4
EPSILON = 1e-5


class Mamba3(Mixer):
    r"""The Mamba-3 layer: projection, :func:`seqmodels.ops.mamba3.mamba3`, projection.

    .. code-block:: text

        z, x, B, C, dt', A', l', theta = in_proj(u)
        dt = softplus(dt' + dt_bias),  a = min(-f(A'), -1e-4),  l = sigmoid(l'),  rate = pi tanh(theta)
        k_r = rotate(phi, RMSNorm(B_r) + B_bias_r),  q_r from C,   phi_t = phi_{t-1} + rate_t dt_t
        S_t = e^{dt a} S_{t-1} + (1 - l) dt e^{dt a} sum_r x_{t-1},r k_{t-1},r^T + l dt sum_r x_t,r k_t,r^T
        y_r = S q_r + D x_r,   out = out_proj(sum_r mimo_o_r y_r silu(mimo_z_r z)),   x_r = mimo_x_r x

    Parameter names and shapes are those of the released checkpoints (sections 3.1 to 3.4 and
    appendix of the paper). The state does not grow: H P N + H P + R H N + H A numbers of 32 bits.

    Args:
        d_model: width of the input and output.
        d_state: N, state width of a head.
        expand: inner width over d_model.
        head_dim: P; the number of heads is expand * d_model / P.
        num_groups: G, groups of heads that share B and C; divides the number of heads.
        mimo_rank: R of the MIMO form, or None for SISO. Rank 1 is MIMO with its three weights.
        rope_fraction: part of the state's lanes that are rotated, 0.5 or 1.0.
        pairing: lanes that form a complex number: "adjacent" (2i, 2i + 1), what released SISO
            models use, or "half" (i, i + N // 2), what released MIMO models use.
        a_activation: f above. "heavy_tail": 1 + u for u >= 0, 1 / (1 - u) below (released code
            since June 2026); "softplus": before. Nothing in a checkpoint's tensors tells them apart.
        out_norm: RMSNorm over each head's outputs in front of the gate (for hybrids).
        dt_min, dt_max, dt_init_floor: dt starts log-uniform in [dt_min, dt_max], at least the floor.
        rotation: "data_dependent"; "fixed" (standard rotary) and "none" are the paper's ablations.
        trapezoid: False fixes l to 1 (exponential Euler), the paper's other ablation.

    Raises:
        ValueError: sizes that do not divide, an unknown option, rope_fraction other than 0.5 and 1.
    """

    parameter_hints: ClassVar[dict[str, ParameterHint]] = {
        "dt_bias": ParameterHint(weight_decay=0.0),
        "D": ParameterHint(weight_decay=0.0),
    }

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        mimo_rank: int | None = None,
        rope_fraction: float = 0.5,
        pairing: Literal["adjacent", "half"] = "adjacent",
        a_activation: Literal["heavy_tail", "softplus"] = "heavy_tail",
        out_norm: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        rotation: Literal["data_dependent", "fixed", "none"] = "data_dependent",
        trapezoid: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model)
        check_positive("Mamba3", d_state=d_state, expand=expand)
        check_divides("Mamba3", "head_dim", head_dim, "expand * d_model", expand * d_model)
        heads = expand * d_model // head_dim
        check_divides("Mamba3", "num_groups", num_groups, "number of heads", heads)
        if mimo_rank is not None:
            check_positive("Mamba3", mimo_rank=mimo_rank)
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"Mamba3: rope_fraction is {rope_fraction!r}; expected 0.5 or 1.0")
        for name, value, known in (
            ("pairing", pairing, PAIRINGS),
            ("a_activation", a_activation, A_ACTIVATIONS),
            ("rotation", rotation, ROTATIONS),
        ):
            if value not in known:
                raise ValueError(f"Mamba3: {name} is {value!r}; expected one of {', '.join(map(repr, known))}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba3: dt_min={dt_min} and dt_max={dt_max}; expected 0 < dt_min <= dt_max")
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.pairing = pairing
        ranks = 1 if mimo_rank is None else mimo_rank
        self.projection = Projection(
            num_heads=heads,
            head_dim=head_dim,
            d_state=d_state,
            num_groups=num_groups,
            ranks=ranks,
            angles=0 if rotation == "none" else int(d_state * rope_fraction) // 2,
            a_activation=a_activation,
            a_floor=A_FLOOR,
            rotation=rotation,
            trapezoid=trapezoid,
        )
        inner = expand * d_model
        made = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": state_dtype(torch.get_default_dtype() if dtype is None else dtype)}
        self.in_proj = nn.Linear(d_model, sum(self.projection.widths), bias=False, **made)
        self.dt_bias = nn.Parameter(torch.empty(heads, **wide))
        self.B_bias = nn.Parameter(torch.empty(heads, ranks, d_state, **wide))
        self.C_bias = nn.Parameter(torch.empty(heads, ranks, d_state, **wide))
        self.B_norm = nn.RMSNorm(d_state, eps=EPSILON, **made)
        self.C_norm = nn.RMSNorm(d_state, eps=EPSILON, **made)

        def mix() -> nn.Parameter | None:
            return None if mimo_rank is None else nn.Parameter(torch.empty(heads, ranks, head_dim, **wide))

        self.mimo_x, self.mimo_z, self.mimo_o = mix(), mix(), mix()
        self.D = nn.Parameter(torch.empty(heads, **wide))
        self.norm = nn.RMSNorm(inner, eps=EPSILON, **made) if out_norm else None
        self.out_proj = nn.Linear(inner, d_model, bias=False, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values; the norms start at 1, the projections as ``nn.Linear`` does."""
        for linear in (self.in_proj, self.out_proj):
            linear.reset_parameters()
        for ones in (self.B_norm.weight, self.C_norm.weight, self.B_bias, self.C_bias, self.D):
            ones.fill_(1)
        if self.norm is not None:
            self.norm.weight.fill_(1)
        if self.mimo_x is not None and self.mimo_z is not None and self.mimo_o is not None:
            self.mimo_x.fill_(1 / self.projection.ranks)
            self.mimo_z.fill_(1)
            self.mimo_o.fill_(1 / self.projection.ranks)
        low, high, floor = self.dt_range
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
        self.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())

    def _weights(self) -> dict[str, Any]:
        return {
            "b_weight": self.B_norm.weight,
            "c_weight": self.C_norm.weight,
            "b_bias": self.B_bias,
            "c_bias": self.C_bias,
            "skip": self.D,
            "mimo_x": self.mimo_x,
            "mimo_z": self.mimo_z,
            "mimo_o": self.mimo_o,
            "norm_weight": None if self.norm is None else self.norm.weight,
        }

    def forward(
        self,
        x: Tensor,
        state: Mamba3State | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        if state is not None:
            self.check_state(state, x.shape[0] if layout is None else layout.num_documents)
        token = self.projection.unpack(self.in_proj(x), self.dt_bias)
        y, after = mamba3(
            *token[:8],
            **self._weights(),
            phase_step=token.phase_step,
            initial_state=state,
            layout=layout,
            pairing=self.pairing,
            epsilon=EPSILON,
        )
        return MixerOutput(self.out_proj(y.flatten(-2)), after if return_state else None)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: Mamba3State) -> Tensor:
        y = mamba3_step(
            apply_linear(self.in_proj, x_t),
            state,
            self.projection,
            dt_bias=self.dt_bias,
            **self._weights(),
            pairing=self.pairing,
            epsilon=EPSILON,
        )
        return apply_linear(self.out_proj, y)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba3State:
        """Zeros: all four fields are float32 (float64 beside float64), whatever the context length."""
        p = self.projection
        shapes = state_shapes(batch_size, p.num_heads, p.head_dim, p.d_state, p.ranks, p.angles)
        wide = state_dtype(self.in_proj.weight.dtype if dtype is None else dtype)
        place = self.D.device if device is None else device
        return Mamba3State(*(torch.zeros(shape, dtype=wide, device=place) for shape in shapes.values()))

    def flops(self, length: int) -> int:
        p, chunk = self.projection, 64
        # Chunks of 64 rows (token, rank): scores and their product with v, state in and out.
        a_head = 2 * chunk * p.ranks * (p.d_state + p.head_dim) + 4 * p.ranks * p.d_state * p.head_dim
        return super().flops(length) + length * p.num_heads * a_head

    def extra_repr(self) -> str:
        p: Any = self.projection
        return (
            f"d_state={p.d_state}, heads={p.num_heads}x{p.head_dim}, groups={p.num_groups}, ranks={p.ranks}, "
            f"angles={p.angles}, pairing={self.pairing!r}, a_activation={p.a_activation!r}"
        )
