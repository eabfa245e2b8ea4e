"""A small hybrid with every kind of state, and a layer of a user's own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers import MIXERS, Mixer, MixerOutput, ParameterHint, register_mixer
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.state import EmptyState, State

HYBRID = {
    "vocab_size": 50,
    "d_model": 16,
    "pattern": "gated_conv swiglu linear_attention swiglu attention swiglu window>mlp",
    "layers": {
        "linear_attention": {"num_heads": 2, "decay": "data_dependent"},
        "attention": {"num_heads": 2},
        "window": {"layer": "attention", "window": 5},
        "swiglu": {"d_hidden": 24},
    },
}


def hybrid(*, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(**{**HYBRID, **changes}), dtype=dtype)
    with torch.no_grad():  # make every part matter, and no two weights alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int, vocab_size: int = 50, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class SumState(State):
    total: Tensor  # (batch, d_model)


if "test_running_sum" not in MIXERS:

    @register_mixer("test_running_sum")
    class RunningSum(Mixer):
        """y_t = scale * sum of x up to t, with an auxiliary loss and a metric."""

        parameter_hints: ClassVar = {"scale": ParameterHint(weight_decay=0.0, learning_rate=1e-3)}

        def __init__(self, d_model: int, *, factor: float = 1.0, kind: str | nn.Module = "plain") -> None:
            super().__init__(d_model)
            if factor <= 0:
                raise ValueError(f"RunningSum: factor is {factor}; expected a positive number")
            self.factor = factor
            self.scale = nn.Parameter(torch.full((d_model,), 0.1))

        def forward(
            self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
        ) -> MixerOutput:
            total = x.cumsum(1) if state is None else x.cumsum(1) + state.total[:, None]
            after = SumState(total[:, -1].clone()) if return_state else None
            aux = {"size_loss": self.factor * x.square().mean(), "size": x.detach().abs().mean()}
            return MixerOutput(self.scale * total, after, aux)

    @register_mixer("test_bidirectional")
    class Bidirectional(Mixer):
        """y_t = mean of x over the whole sequence."""

        causality = "bidirectional"

        def forward(
            self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
        ) -> MixerOutput:
            return MixerOutput(x.mean(1, keepdim=True).expand_as(x), EmptyState() if return_state else None)

    @register_mixer("test_prefix")
    class PrefixMean(Mixer):
        """y_t = mean of x over the prefix."""

        causality = "prefix"

        def forward(
            self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
        ) -> MixerOutput:
            inside = (layout.position < layout.prefix_lengths[layout.document])[..., None]
            mean = (x * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)
            return MixerOutput(mean.expand_as(x), EmptyState() if return_state else None)

        def init_state(self, batch_size: int, **options: Any) -> EmptyState:
            return EmptyState()
