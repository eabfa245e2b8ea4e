"""The gated short convolution of Based and JRT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, check_positive
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.short_conv import short_conv, short_conv_step
from seqmodels.state import State


class GatedConvState(State):
    inputs: Tensor  # (batch, kernel_size - 1, channels): the convolution's last inputs, oldest first


class GatedConv(Mixer):
    r"""BaseConv: a causal depthwise convolution, gated by a second branch.

    .. code-block:: text

        (u1, u2) = split(W_in x + b_in)             d_model -> 2 channels
        y = W_out(silu(conv(u1)) * u2) + b_out      channels -> d_model

    conv is depthwise and causal, without bias (JRT, arXiv:2407.05483, appendix; Based,
    arXiv:2402.18668).

    Args:
        d_model: width of the residual stream.
        expand: channels = expand * d_model.
        kernel_size: taps of the convolution.

    State: ``inputs`` (batch, kernel_size - 1, channels).
    """

    def __init__(self, d_model: int, *, expand: int = 2, kernel_size: int = 3) -> None:
        super().__init__(d_model)
        check_positive(type(self).__name__, expand=expand, kernel_size=kernel_size)
        self.channels, self.kernel_size = expand * d_model, kernel_size
        self.in_proj = nn.Linear(d_model, 2 * self.channels)
        self.conv_weight = nn.Parameter(torch.empty(self.channels, kernel_size))
        self.out_proj = nn.Linear(self.channels, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The convolution starts as ``nn.Conv1d`` does: uniform in +-1/sqrt(kernel_size)."""
        self.conv_weight.uniform_(-(self.kernel_size**-0.5), self.kernel_size**-0.5)

    def forward(
        self,
        x: Tensor,
        state: GatedConvState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        if state is not None:
            self.check_state(state, x.shape[0] if layout is None else layout.num_documents)
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, final = short_conv(
            u, self.conv_weight,
            initial_state=None if state is None else state.inputs, activation="silu", layout=layout,
        )  # fmt: skip
        return MixerOutput(self.out_proj(u * gate), GatedConvState(final) if return_state else None, {})

    @torch.no_grad()
    def step(self, x_t: Tensor, state: GatedConvState) -> Tensor:
        u, gate = self.in_proj(x_t).chunk(2, dim=-1)
        return self.out_proj(short_conv_step(u, self.conv_weight, None, state.inputs, activation="silu") * gate)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GatedConvState:
        weight = self.conv_weight
        return GatedConvState(
            torch.zeros(
                (batch_size, self.kernel_size - 1, self.channels),
                device=weight.device if device is None else device,
                dtype=state_dtype(dtype or weight.dtype),
            )
        )

    def flops(self, length: int) -> int:
        return super().flops(length) + 2 * length * self.channels * self.kernel_size
