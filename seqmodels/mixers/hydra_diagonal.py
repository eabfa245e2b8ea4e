"""The diagonal state-space path of the Hydra hybrid: one scalar of state a channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, ParameterHint
from seqmodels.ops.linear_recurrence import linear_recurrence, linear_recurrence_step
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.short_conv import short_conv
from seqmodels.state import State


class HydraDiagonalState(State):
    scalar: Tensor  # (batch, d_model)


class HydraDiagonal(Mixer):
    r"""Gated diagonal recurrence, the faithful SSM path of Hydra (arXiv:2508.15099, section 3).

    .. code-block:: text

        [D, B, C, U] = W_in u;     alpha_t = exp(-softplus(D_t) softplus(lambda))
        y_t = C_t s_t + W_skip u_t;       s_{t+1} = alpha_t s_t + B_t U_t        elementwise, s_0 = 0

    The state is read before it is updated, so a token reaches its own output through W_skip alone.
    With one scalar a channel it remembers little; it is here as the published definition. Use
    ``mamba2`` or ``mamba3`` as a hybrid's state-space path.

    Args:
        d_model: width of x, y and the state.

    State: ``scalar`` (batch, d_model), float32.
    """

    parameter_hints: ClassVar[dict[str, ParameterHint]] = {"decay_rate": ParameterHint(weight_decay=0.0)}
    residual_outputs: ClassVar[tuple[str, ...]] = ("skip_proj.weight",)

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.in_proj = nn.Linear(d_model, 4 * d_model, bias=False)
        self.skip_proj = nn.Linear(d_model, d_model, bias=False)
        self.decay_rate = nn.Parameter(torch.empty(d_model))  # lambda
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws softplus(lambda) log-uniform in [0.002, 0.3]: at D = 0, where softplus(D) = ln 2, time scales
        start between about 5 and 700 tokens."""
        rate = torch.empty_like(self.decay_rate).uniform_(-6.2, -1.2).exp_()
        self.decay_rate.copy_(rate + torch.log(-torch.expm1(-rate)))

    def forward(
        self,
        x: Tensor,
        state: HydraDiagonalState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        before = None
        if state is not None:
            self.check_state(state, x.shape[0] if layout is None else layout.num_documents)
            before = state.scalar
        decay, read, update = self._project(x)
        after, final = linear_recurrence(decay, update, initial_state=before, layout=layout)
        # s_t is the recurrence's value one token earlier: a convolution whose only weight meets the previous token.
        previous = torch.eye(1, 2, dtype=after.dtype, device=x.device).expand(self.d_model, 2)  # (1, 0)
        seen, _ = short_conv(
            after, previous, initial_state=None if before is None else before.unsqueeze(1), layout=layout
        )
        y = read * seen.to(read.dtype) + self.skip_proj(x)
        return MixerOutput(y, HydraDiagonalState(final) if return_state else None, {})

    @torch.no_grad()
    def step(self, x_t: Tensor, state: HydraDiagonalState) -> Tensor:
        decay, read, update = self._project(x_t)
        y = read * state.scalar.to(read.dtype) + self.skip_proj(x_t)
        linear_recurrence_step(decay, update, state.scalar)
        return y

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HydraDiagonalState:
        weight = self.in_proj.weight
        return HydraDiagonalState(
            torch.zeros(
                (batch_size, self.d_model),
                device=weight.device if device is None else device,
                dtype=state_dtype(dtype or weight.dtype),
            )
        )

    def flops(self, length: int) -> int:
        return super().flops(length) + 4 * length * self.d_model  # decay and update of the state, two for the read

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, C and B U, each (..., d_model); the decay and the update out of half precision."""
        step, b, c, u = self.in_proj(x).chunk(4, dim=-1)
        dtype = state_dtype(x.dtype)
        decay = torch.exp(-softplus(step.to(dtype)) * softplus(self.decay_rate.to(dtype)))
        return decay, c, b.to(dtype) * u.to(dtype)
