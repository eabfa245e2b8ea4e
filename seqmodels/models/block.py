"""One residual block: a norm, one or more parallel paths of layers with gates, dropout, and the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def check_room(self, state: BranchState) -> None:
        """Asks every layer (:meth:`Mixer.check_room`)."""
        for layer, layer_state in zip(self.members(), state.layers, strict=True):
            layer.check_room(layer_state)

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

    def with_capacity(self, state: BranchState, max_length: int | None, *, shrink: bool = True) -> BranchState:
        pairs = zip(self.members(), state.layers, strict=True)
        return BranchState(tuple(layer.with_capacity(part, max_length, shrink=shrink) for layer, part in pairs))

    def flops(self, length: int) -> int:
        return sum(layer.flops(length) for layer in self.members())


class ParallelState(State):
    """The states of parallel paths, in order."""

    paths: tuple


class Parallel(nn.Module):
    """y = sum_i g_i path_i(x): parallel paths on one input, each with a learned scalar gate or with none.

    A path is a layer or a :class:`Branch`. ``aux`` has a path's metrics under its word, and its gate.

    Args:
        paths: by word, in order.
        gates: first values of the gates; 1 without a gate for None.

    Attributes:
        inactive: words of paths that do not run, for a training curriculum: they add exactly 0, have no
            auxiliary loss, and leave their state as it is.
    """

    def __init__(self, paths: Mapping[str, Mixer | Branch], gates: Sequence[float | None]) -> None:
        super().__init__()
        self.words = tuple(paths)
        self.paths = nn.ModuleList(paths.values())
        # (1,) rather than a scalar, which FSDP2 cannot shard.
        self.gates = nn.ParameterDict(
            {
                word.replace(">", "_"): nn.Parameter(torch.full((1,), gate))
                for word, gate in zip(paths, gates, strict=True)
                if gate is not None
            }
        )
        self.inactive: set[str] = set()

    def gate(self, word: str) -> nn.Parameter | None:
        """The gate of a path, (1,), or None."""
        return self.gates.get(word.replace(">", "_"))

    def named_paths(self) -> list[tuple[str, Mixer | Branch]]:
        """The paths by word, in order."""
        return [(word, cast("Mixer | Branch", path)) for word, path in zip(self.words, self.paths, strict=True)]

    def members(self) -> list[Mixer]:
        """The layers of all paths in order."""
        return [
            layer
            for _, path in self.named_paths()
            for layer in (path.members() if isinstance(path, Branch) else [path])
        ]

    def check_room(self, state: ParallelState) -> None:
        """Asks every path."""
        for (_, path), path_state in zip(self.named_paths(), state.paths, strict=True):
            path.check_room(path_state)

    def forward(
        self, x: Tensor, state: ParallelState | None = None, *, layout: Layout | None = None, return_state: bool = False
    ) -> MixerOutput:
        y: Tensor | None = None
        states: list[Any] = []
        aux: dict[str, Tensor] = {}
        for index, (word, path) in enumerate(self.named_paths()):
            before = None if state is None else state.paths[index]
            if word in self.inactive:
                states.append(_untouched(path, before, x, layout) if return_state else None)
                continue
            output = path(x, before, layout=layout, return_state=return_state)
            added = self._gated(word, output.y)
            y = added if y is None else y + added
            states.append(output.state)
            aux = merge_aux(aux, output.aux, word)
            gate = self.gate(word)
            if gate is not None:
                aux[f"{word}.gate"] = gate.detach()[0].clone()  # FSDP2 frees the whole gate behind the forward
        y = torch.zeros_like(x) if y is None else y
        return MixerOutput(y, ParallelState(tuple(states)) if return_state else None, aux)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: ParallelState) -> Tensor:
        y = None
        for (word, path), path_state in zip(self.named_paths(), state.paths, strict=True):
            if word not in self.inactive:
                added = self._gated(word, path.step(x_t, path_state))
                y = added if y is None else y + added
        return torch.zeros_like(x_t) if y is None else y

    def init_state(self, batch_size: int, **options: Any) -> ParallelState:
        return ParallelState(tuple(path.init_state(batch_size, **options) for _, path in self.named_paths()))

    def with_capacity(self, state: ParallelState, max_length: int | None, *, shrink: bool = True) -> ParallelState:
        pairs = zip(self.named_paths(), state.paths, strict=True)
        return ParallelState(tuple(path.with_capacity(part, max_length, shrink=shrink) for (_, path), part in pairs))

    def flops(self, length: int) -> int:
        return sum(path.flops(length) for _, path in self.named_paths())

    def _gated(self, word: str, y: Tensor) -> Tensor:
        gate = self.gate(word)
        return y if gate is None else gate.to(y.dtype) * y


class Block(nn.Module):
    """h + dropout(layer(norm(h))) with the norm before, norm(h + dropout(layer(h))) with it after.

    h is (batch, length, d_model) in the residual stream's dtype; the layer works in ``dtype``.

    Attributes:
        inactive: set for a block that does not run, by a training curriculum: the layer adds exactly 0, has no
            auxiliary loss, and leaves its state as it is. (:class:`Parallel` has the same for one path.)
    """

    def __init__(
        self, layer: Mixer | Branch | Parallel, norm: nn.Module, dropout: Dropout, *, norm_first: bool
    ) -> None:
        super().__init__()
        self.norm = norm
        self.layer = layer
        self.dropout = dropout
        self.norm_first = norm_first
        self.inactive = False

    def forward(
        self, h: Tensor, state: Any, layout: Layout | None, return_state: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        x = self.norm(h, layout) if self.norm_first else h
        x = x.to(dtype)
        if self.inactive:
            output = MixerOutput(
                torch.zeros_like(x), _untouched(self.layer, state, x, layout) if return_state else None
            )
        else:
            output = self.layer(x, state, layout=layout, return_state=return_state)
        h = h + self.dropout(output.y)
        if not self.norm_first:
            h = self.norm(h, layout)
        return h, output.state, output.aux

    def layers(self) -> list[Mixer]:
        """The layers of the block in order."""
        return [self.layer] if isinstance(self.layer, Mixer) else self.layer.members()

    def check_room(self, state: Any) -> None:
        """Asks every layer of the block (:meth:`Mixer.check_room`)."""
        self.layer.check_room(state)

    def step(self, h_t: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        x_t = self.norm(h_t) if self.norm_first else h_t
        if not self.inactive:
            h_t = h_t + self.layer.step(x_t.to(dtype), state)
        return h_t if self.norm_first else self.norm(h_t)


def _untouched(layer: Mixer | Branch | Parallel, before: Any, x: Tensor, layout: Layout | None) -> Any:
    """The state of a layer that does not run."""
    if before is not None:
        return before.clone()
    documents = x.shape[0] if layout is None else layout.num_documents
    return layer.init_state(documents, max_length=x.shape[1], device=x.device, dtype=x.dtype)


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
