"""One residual block: a norm, a branch of one or more layers, dropout, and the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput
from seqmodels.models.normalization import Dropout
from seqmodels.state import State


class BranchState(State):
    """The states of a branch's layers, in order."""

    layers: tuple


class Branch(nn.Module):
    """Layers applied in turn inside one residual branch (``s4d>glu``), with dropout between them."""

    def __init__(self, layers: Sequence[Mixer], dropout: Dropout) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = dropout

    def members(self) -> list[Mixer]:
        """The layers in order."""
        return [cast(Mixer, layer) for layer in self.layers]

    def forward(
        self, x: Tensor, state: BranchState | None = None, *, layout: Layout | None = None, return_state: bool = False
    ) -> MixerOutput:
        states: list[Any] = []
        aux: dict[str, Tensor] = {}
        for index, layer in enumerate(self.members()):
            if index:
                x = self.dropout(x)
            before = None if state is None else state.layers[index]
            output = layer(x, before, layout=layout, return_state=return_state)
            x = output.y
            states.append(output.state)
            aux = merge_aux(aux, output.aux, str(index))
        return MixerOutput(x, BranchState(tuple(states)) if return_state else None, aux)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: BranchState) -> Tensor:
        for layer, layer_state in zip(self.members(), state.layers, strict=True):
            x_t = layer.step(x_t, layer_state)
        return x_t

    def init_state(self, batch_size: int, **options: Any) -> BranchState:
        return BranchState(tuple(layer.init_state(batch_size, **options) for layer in self.members()))

    def flops(self, length: int) -> int:
        return sum(layer.flops(length) for layer in self.members())


class Block(nn.Module):
    """h + dropout(layer(norm(h))) with the norm before, norm(h + dropout(layer(h))) with it after.

    h is (batch, length, d_model) in the residual stream's dtype; the layer works in ``dtype``.
    """

    def __init__(self, layer: Mixer | Branch, norm: nn.Module, dropout: Dropout, *, norm_first: bool) -> None:
        super().__init__()
        self.norm = norm
        self.layer = layer
        self.dropout = dropout
        self.norm_first = norm_first

    def forward(
        self, h: Tensor, state: Any, layout: Layout | None, return_state: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        x = self.norm(h, layout) if self.norm_first else h
        output = self.layer(x.to(dtype), state, layout=layout, return_state=return_state)
        h = h + self.dropout(output.y)
        if not self.norm_first:
            h = self.norm(h, layout)
        return h, output.state, output.aux

    def layers(self) -> list[Mixer]:
        """The layers of the branch in order."""
        return self.layer.members() if isinstance(self.layer, Branch) else [self.layer]

    def check_room(self, state: Any) -> None:
        """Asks every layer of the branch (:meth:`Mixer.check_room`)."""
        states = state.layers if isinstance(self.layer, Branch) else (state,)
        for layer, layer_state in zip(self.layers(), states, strict=True):
            layer.check_room(layer_state)

    def step(self, h_t: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        x_t = self.norm(h_t) if self.norm_first else h_t
        h_t = h_t + self.layer.step(x_t.to(dtype), state)
        return h_t if self.norm_first else self.norm(h_t)


def merge_aux(total: dict[str, Tensor], new: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Adds losses of one name; keeps metrics apart by layer (``<prefix>.<name>``)."""
    if not new:
        return total
    result = dict(total)
    for name, value in new.items():
        if name.endswith("_loss"):
            result[name] = result[name] + value if name in result else value
        else:
            result[f"{prefix}.{name}"] = value
    return result
