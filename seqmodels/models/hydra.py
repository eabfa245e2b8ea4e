"""The Hydra hybrid: state space, sparse attention and experts side by side, and two memories."""

from __future__ import annotations

from typing import Any

import msgspec

from seqmodels.models.arguments import default_arguments, layer_class
from seqmodels.models.config import Initialization, ModelConfig

#: Words of the parts in the model's pattern: what a training curriculum calls them.
STATE_SPACE, ATTENTION, EXPERTS, WORKSPACE, MEMORY = "state_space", "sparse_attention", "experts", "workspace", "memory"


class HydraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    r"""A Hydra model (arXiv:2508.15099), written out by :meth:`model_config` as an ordinary stack.

    .. code-block:: text

        u = N(x);    y = x + g1 state_space(u) + g2 sparse_attention(u) + g3 experts(u)
        then, at their sites,  y + workspace(N(y)),  y + memory(N(y))

    with learned scalars g for each block; a path that a block does not have is not there. All
    workspaces share one set of weights and keep a state each; so do all memories one table.
    In a YAML file: ``architecture: hydra`` beside these keys.

    Attributes:
        vocab_size, d_model: of the model.
        num_blocks: blocks with a state-space path.
        mixer: registry name of that path's layer; ``hydra_diag`` is the published one.
        state_space: its arguments.
        attention: arguments of :class:`~seqmodels.mixers.SparseGlobalAttention`; null for a model without.
        experts: arguments of :class:`~seqmodels.channel.ChunkMoE`; null for a model without.
        workspace: arguments of :class:`~seqmodels.mixers.Workspace`; null for none. It follows each block
            that has attention.
        memory: arguments of :class:`~seqmodels.channel.ProductKeyMemory`; null for none.
        gates: first values of g1, g2, g3.
        attention_every, experts_every: attention in the last of so many blocks, experts in the first.
        memory_blocks: blocks, from 0, that the memory follows; at 1/6, 3/6 and 5/6 of the depth when null.
        tie_head, norm_epsilon, residual_in_float32, dropout, activation_checkpointing, initialization: as in
            :class:`~seqmodels.models.ModelConfig`.

    Raises:
        ValueError: a segment of the workspace that is not made of whole chunks of the experts, an attention
            window below that segment, sites outside the model.
    """

    vocab_size: int
    d_model: int
    num_blocks: int
    mixer: str = "mamba3"
    state_space: dict[str, Any] = {}
    attention: dict[str, Any] | None
    experts: dict[str, Any] | None
    workspace: dict[str, Any] | None = {}
    memory: dict[str, Any] | None = {}
    gates: tuple[float, float, float] = (0.8, 0.2, 0.5)
    attention_every: int = 3
    experts_every: int = 2
    memory_blocks: tuple[int, ...] | None = None
    tie_head: bool = True
    norm_epsilon: float = 1e-5
    residual_in_float32: bool = False
    dropout: float = 0.0
    activation_checkpointing: bool = False
    initialization: Initialization = msgspec.field(default_factory=Initialization)

    def __post_init__(self) -> None:
        for name in ("num_blocks", "attention_every", "experts_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive integer")
        for site in self.memory_blocks or ():
            if not 0 <= site < self.num_blocks:
                raise ValueError(f"memory_blocks has {site}; expected blocks 0 to {self.num_blocks - 1}")
        self._check_sizes()

    def model_config(self) -> ModelConfig:
        """The same model as a pattern of words."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            pattern=" ".join(self._blocks()),
            layers=self._layers(),
            tie_head=self.tie_head,
            norm_epsilon=self.norm_epsilon,
            residual_in_float32=self.residual_in_float32,
            dropout=self.dropout,
            activation_checkpointing=self.activation_checkpointing,
            initialization=self.initialization,
        )

    def memory_sites(self) -> tuple[int, ...]:
        """Blocks that the memory follows."""
        if self.memory is None:
            return ()
        sites = self.memory_blocks
        if sites is None:
            sites = tuple(dict.fromkeys(part * self.num_blocks // 6 for part in (1, 3, 5)))
        return sites

    def _blocks(self) -> list[str]:
        blocks = []
        memory = self.memory_sites()
        for index in range(self.num_blocks):
            attends = self.attention is not None and (index + 1) % self.attention_every == 0
            mixes = self.experts is not None and index % self.experts_every == 0
            blocks.append("|".join([STATE_SPACE] + [ATTENTION] * attends + [EXPERTS] * mixes))
            blocks += [WORKSPACE] * (attends and self.workspace is not None) + [MEMORY] * (index in memory)
        return blocks

    def _layers(self) -> dict[str, dict[str, Any]]:
        state_space, attention, experts = self.gates
        layers = {STATE_SPACE: {"layer": self.mixer, "path_gate": state_space, **self.state_space}}
        if self.attention is not None:
            layers[ATTENTION] = {"layer": "sparse_global_attention", "path_gate": attention, **self.attention}
        if self.experts is not None:
            layers[EXPERTS] = {"layer": "chunk_moe", "path_gate": experts, **self.experts}
        if self.workspace is not None and self.attention is not None:
            layers[WORKSPACE] = {"share": WORKSPACE, **self.workspace}
        if self.memory is not None:
            layers[MEMORY] = {"layer": "product_key_memory", "share": MEMORY, **self.memory}
        return layers

    def _check_sizes(self) -> None:
        """The published nesting: chunks inside segments, segments inside windows."""
        if self.workspace is None or self.attention is None:
            return
        segment = _argument("workspace", self.workspace, "segment")
        if self.experts is not None:
            chunk = _argument("chunk_moe", self.experts, "chunk_size")
            if chunk >= 1 and segment % chunk:
                raise ValueError(
                    f"workspace.segment is {segment} and experts.chunk_size {chunk}; expected a segment of whole "
                    f"chunks, for example {-(-segment // chunk) * chunk}"
                )
        window = _argument("sparse_global_attention", self.attention, "window")
        if window < segment:
            raise ValueError(
                f"attention.window is {window} and workspace.segment {segment}; expected a window of at least a "
                "segment, since the workspace shows a token nothing of its own segment"
            )


def _argument(layer: str, given: dict[str, Any], name: str) -> int:
    """A layer's argument as given, or its default."""
    return {**default_arguments(layer_class(layer)), **given}[name]
