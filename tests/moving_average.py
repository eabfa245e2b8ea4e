"""A small correct layer in plain PyTorch: the subject of the laws' own tests."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmodels import Layout, Mixer, MixerOutput, State
from seqmodels.mixers import ParameterHint


class MovingAverageState(State):
    mean: Tensor  # (batch, d_model)
    last: Tensor  # (batch, d_model), the previous token
    position: Tensor  # (batch,) int64


class MovingAverage(Mixer):
    """h_t = a h_{t-1} + (1 - a) (x_t + c x_{t-1}), y_t = W h_t, with a decay a = sigmoid(r) for each channel."""

    parameter_hints: ClassVar = {"decay": ParameterHint(weight_decay=0.0)}

    def __init__(self, d_model: int, width: int = 4) -> None:
        super().__init__(d_model)
        self.decay = nn.Parameter(torch.ones(d_model))
        self.previous = nn.Parameter(torch.zeros(d_model))
        self.out = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch_size, *, max_length=None, device=None, dtype=None):
        like = self.decay
        dtype = torch.float64 if (dtype or like.dtype) == torch.float64 else torch.float32
        device = device or like.device
        zeros = torch.zeros(2, batch_size, self.d_model, device=device, dtype=dtype)
        position = torch.zeros(batch_size, device=device, dtype=torch.int64)
        return MovingAverageState(zeros[0].clone(), zeros[1].clone(), position)

    def forward(self, x, state=None, *, layout=None, return_state=False):
        self.check_input(x, state, layout)
        if layout is None:
            layout = Layout.full(*x.shape[:2], device=x.device)
        if state is None:
            state = self.init_state(layout.num_documents, device=x.device, dtype=x.dtype)
        values = self.masked(x, layout).to(state.mean.dtype)
        a = torch.sigmoid(self.decay.to(values.dtype))
        slot = layout.document.clamp(min=0)
        earlier = values.roll(1, dims=1)
        carried_last, carried_mean = state.last[slot], state.mean[slot]
        shifted = torch.where(self.first(layout)[..., None], carried_last, earlier)
        source = (1 - a) * (values + self.previous.to(values.dtype) * shifted)
        source = torch.where(layout.valid[..., None], source, 0)
        column = torch.arange(x.shape[1], device=x.device)
        age = (column[:, None] - column[None, :]).clamp(min=0).to(values.dtype)
        seen = self.same(layout) & self.visible(column, layout)
        weight = torch.where(seen[..., None], a ** age[..., None], 0)  # (batch, query, key, channel)
        h = (weight * source[:, None]).sum(2) + a ** (layout.position + 1)[..., None].to(a.dtype) * carried_mean
        h = torch.where(layout.valid[..., None], h, 0)
        y = self.mix(h, x, layout)
        if not return_state:
            return MixerOutput(y)
        used = (layout.lengths > 0)[:, None]
        last = layout.last_token()
        return MixerOutput(
            y,
            MovingAverageState(
                torch.where(used, h.flatten(0, 1)[last], state.mean),
                torch.where(used, values.flatten(0, 1)[last], state.last),
                state.position + layout.lengths,
            ),
        )

    # The parts that the broken layers break.

    def masked(self, x: Tensor, layout: Layout) -> Tensor:
        return torch.where(layout.valid[..., None], x, 0)

    def first(self, layout: Layout) -> Tensor:
        """(batch, length), where the previous token comes from the state."""
        return layout.position == 0

    def same(self, layout: Layout) -> Tensor:
        """(batch, query, key)."""
        return layout.document[:, :, None] == layout.document[:, None, :]

    def visible(self, column: Tensor, layout: Layout) -> Tensor:
        """(query, key) or (batch, query, key)."""
        return column[:, None] >= column[None, :]

    def mix(self, h: Tensor, x: Tensor, layout: Layout) -> Tensor:
        return self.out(h.to(x.dtype))

    @torch.no_grad()
    def step(self, x_t: Tensor, state: Any) -> Tensor:
        values = x_t.to(state.mean.dtype)
        a = torch.sigmoid(self.decay.to(values.dtype))
        source = (1 - a) * (values + self.previous.to(values.dtype) * state.last)
        state.mean.mul_(a).add_(source)
        state.last.copy_(values)
        state.position.add_(1)
        return self.out(state.mean.to(x_t.dtype))


class PrefixMovingAverage(MovingAverage):
    """Tokens of the prefix see all of it."""

    causality = "prefix"

    def visible(self, column: Tensor, layout: Layout) -> Tensor:
        causal = super().visible(column, layout)
        if layout.prefix_lengths is None:
            return causal
        inside = layout.position < layout.prefix_lengths[layout.document.clamp(min=0)]
        return causal | (inside[:, :, None] & inside[:, None, :])


class BidirectionalMovingAverage(MovingAverage):
    causality = "bidirectional"

    def visible(self, column: Tensor, layout: Layout) -> Tensor:
        return torch.ones_like(column[:, None] + column[None, :], dtype=torch.bool)
