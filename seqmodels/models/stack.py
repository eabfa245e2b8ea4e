"""The stack of residual blocks that language models and classifiers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer
from seqmodels.models.arguments import build_layer
from seqmodels.models.block import Block, Branch, Parallel, merge_aux
from seqmodels.models.block_spec import BlockSpec, LayerSpec
from seqmodels.models.config import StackConfig
from seqmodels.models.initialization import initialize_layers
from seqmodels.models.normalization import Dropout, make_norm
from seqmodels.ops.registration import state_dtype
from seqmodels.state import State


class ModelState(State):
    """The states of all blocks in order; blocks that share weights have a state each."""

    layers: tuple


class StackOutput(NamedTuple):
    """Hidden vectors (batch, length, d_model), the state after the last token, losses and metrics."""

    hidden: Tensor
    state: ModelState | None
    aux: dict[str, Tensor]


class Stack(nn.Module):
    """(batch, length, d_model) to the same shape through the blocks of a :class:`StackConfig`.

    ``blocks`` holds each distinct block once; ``order`` lists the sites, so that a block whose
    weights are shared by id appears several times. Every site has its own state.
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        blocks: list[Block] = []
        shared: dict[str, tuple[int, BlockSpec]] = {}
        self.specs = config.block_specs()
        self.order: list[int] = []
        for spec in self.specs:
            if spec.share is not None and spec.share in shared:
                index, first = shared[spec.share]
                if (first.layers, first.paths[0].gate) != (spec.layers, spec.paths[0].gate):
                    raise ValueError(
                        f"{spec.where} and {first.where} share weights {spec.share!r} but differ: "
                        f"{spec.paths[0]} against {first.paths[0]}; give them one word or the same arguments"
                    )
            else:
                index = len(blocks)
                blocks.append(self._build(spec))
                if spec.share is not None:
                    shared[spec.share] = (index, spec)
            self.order.append(index)
        self.blocks = nn.ModuleList(blocks)
        final = config.norm if config.norm_place == "pre" else "none"
        self.norm = make_norm(final, config.d_model, config.norm_epsilon)
        if not _on_meta(self):
            initialize_layers(self.layers(), len(self.order), config.initialization)

    def _build(self, spec: BlockSpec) -> Block:
        config = self.config
        dropout = Dropout(config.dropout, config.dropout_tied)
        paths: dict[str, Mixer | Branch] = {}
        for path in spec.paths:
            layers = [build_layer(layer.name, config.d_model, layer.arguments, spec.where) for layer in path.layers]
            paths[path.word] = layers[0] if len(layers) == 1 else Branch(layers, dropout)
        gates = [path.gate for path in spec.paths]
        layer = Parallel(paths, gates) if len(paths) > 1 or gates != [None] else paths[spec.paths[0].word]
        norm = make_norm(config.norm, config.d_model, config.norm_epsilon)
        return Block(layer, norm, dropout, norm_first=config.norm_place == "pre")

    def _block(self, index: int) -> Block:
        return cast(Block, self.blocks[index])

    def layers(self) -> list[Mixer]:
        """Each distinct layer once, in order of first use."""
        return [layer for index in range(len(self.blocks)) for layer in self._block(index).layers()]

    def named_layers(self) -> Iterator[tuple[LayerSpec, Mixer, int]]:
        """Every layer at every site in order, with its configuration and the number of its block."""
        for site, (index, spec) in enumerate(zip(self.order, self.specs, strict=True)):
            for layer_spec, layer in zip(spec.layers, self._block(index).layers(), strict=True):
                yield layer_spec, layer, site

    def forward(
        self,
        h: Tensor,
        state: ModelState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> StackOutput:
        if state is not None:
            self._check_state(state)
        dtype = h.dtype
        if self.config.residual_in_float32:
            h = h.to(state_dtype(dtype))
        recompute = self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        states: list[Any] = []
        aux: dict[str, Tensor] = {}
        for site, index in enumerate(self.order):
            before = None if state is None else state.layers[site]
            block = self._block(index)
            if recompute:
                result = checkpoint(block, h, before, layout, return_state, dtype, use_reentrant=False)
            else:
                result = block(h, before, layout, return_state, dtype)
            h, after, block_aux = result
            states.append(after)
            aux = merge_aux(aux, block_aux, f"block{site}")
        h = self.norm(h, layout).to(dtype)
        return StackOutput(h, ModelState(tuple(states)) if return_state else None, aux)

    @torch.no_grad()
    def step(self, h_t: Tensor, state: ModelState) -> Tensor:
        """One token for each row: (batch, d_model) to the same shape; ``state`` is updated in place."""
        self._check_state(state)
        # Only where reading a number is free and possible: not while compiling, not on fake tensors.
        if h_t.device.type == "cpu" and not torch.compiler.is_compiling() and type(h_t) is Tensor:
            for index, block_state in zip(self.order, state.layers, strict=True):
                self._block(index).check_room(block_state)
        dtype = h_t.dtype
        if self.config.residual_in_float32:
            h_t = h_t.to(state_dtype(dtype))
        for index, block_state in zip(self.order, state.layers, strict=True):
            h_t = self._block(index).step(h_t, block_state, dtype)
        return self.norm(h_t).to(dtype)

    def _check_state(self, state: ModelState) -> None:
        if not isinstance(state, ModelState):
            raise TypeError(f"state is a {type(state).__name__}; expected a ModelState from this model's init_state")
        if len(state.layers) != len(self.order):
            raise ValueError(
                f"the state has {len(state.layers)} blocks, this model {len(self.order)}; "
                "make it with this model's init_state(batch_size)"
            )

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """The state before the first token. ``max_length`` is needed where a layer's state grows with it."""
        return ModelState(
            tuple(
                self._block(index).layer.init_state(batch_size, max_length=max_length, device=device, dtype=dtype)
                for index in self.order
            )
        )

    def with_capacity(self, state: ModelState, max_length: int | None, *, shrink: bool = True) -> ModelState:
        """The same state with room for ``max_length`` tokens in all; see :meth:`Mixer.with_capacity`."""
        pairs = zip(self.order, state.layers, strict=True)
        return ModelState(
            tuple(self._block(index).layer.with_capacity(part, max_length, shrink=shrink) for index, part in pairs)
        )

    def pin(self, count: int) -> None:
        """Keeps the first ``count`` tokens of a document in sight of every layer (:meth:`Mixer.pin`).

        Raises:
            ValueError: for a layer that cannot, with its block; when no layer has a state that could hold them.
        """
        pinned: set[int] = set()
        held = 0
        for spec, layer, site in self.named_layers():
            if id(layer) in pinned:
                continue
            pinned.add(id(layer))
            try:
                layer.pin(count)
                held += layer.init_state(1, max_length=count, device="meta").nbytes
            except (ValueError, NotImplementedError) as error:
                reason = str(error) or "It has no init_state"
                raise ValueError(f"block {site} ({spec.name}) cannot be used with meta tokens. {reason}") from error
        if held == 0:
            raise ValueError(
                "every layer treats each token alone, so nothing would read the meta tokens; set meta_tokens: 0"
            )

    def flops(self, length: int) -> int:
        """Multiply and add operations of all blocks over one sequence; norms and sums are left out."""
        return sum(self._block(index).layer.flops(length) for index in self.order)


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def check_causal(stack: Stack, owner: str, objective: str) -> None:
    """Refuses what would let a token see a later one, naming the block and the way out."""
    if stack.config.norm == "batch":
        raise ValueError(
            f"{owner}: norm 'batch' takes statistics over the length, so a token would see later ones; "
            "use norm 'rms' or 'layer' (batch norm is for SequenceClassifier)"
        )
    for spec, layer, site in stack.named_layers():
        if layer.causality == "bidirectional":
            raise ValueError(
                f"{owner}: block {site} ({spec.name}) is bidirectional, so a token would see later ones; "
                "make it causal, take another layer, or use SequenceClassifier"
            )
        if layer.causality == "prefix" and objective != "prefix":
            raise ValueError(
                f"{owner}: block {site} ({spec.name}) reads a prefix in both directions; "
                "set objective: prefix, which scores no next token inside the prefix"
            )
