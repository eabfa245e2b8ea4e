"""Channel modules that treat every token alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput
from seqmodels.state import EmptyState


class TokenwiseChannel(Mixer):
    """y_t = f(x_t): a layer in the mixers' contract whose state is empty.

    Subclasses implement :meth:`transform`. Documents and padding change nothing, since no
    token sees another.
    """

    def transform(self, x: Tensor) -> Tensor:
        """Maps (..., d_model) to the same shape, each vector by itself."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        self.check_empty(state)
        return MixerOutput(self.transform(x), EmptyState() if return_state else None)

    def check_empty(self, state: Any) -> None:
        """Refuses the state of another layer."""
        if state is not None and not isinstance(state, EmptyState):
            raise TypeError(
                f"{type(self).__name__} has no state; got {type(state).__name__}, expected EmptyState or None"
            )

    @torch.no_grad()
    def step(self, x_t: Tensor, state: EmptyState) -> Tensor:
        return self.transform(x_t)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> EmptyState:
        return EmptyState()
