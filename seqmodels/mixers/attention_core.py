"""What the Hedgehog layers share: feature maps around an attention core, and projections around the core.

A core takes queries, keys and values and knows nothing of where they come from, so that it also stands in
for the attention of a converted model. A layer is projections, rotary positions and a core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, check_divides, check_positive
from seqmodels.mixers.feature_maps import FeatureMap, Initialization, make_feature_map, paired_features
from seqmodels.ops.rotary import rotary, rotary_tables, token_positions


class AttentionCore(nn.Module):
    """Base of cores: a feature map for queries and one for keys, per query head.

    Subclasses have ``forward(q, k, v, state=None, *, layout=None, return_state=False)``, which returns y and
    the state, ``step(q, k, v, state)`` and ``init_state(batch_size, device=..., dtype=...)``. q is (batch,
    length, num_heads, head_dim), k and v (batch, length, num_kv_heads, head_dim or value_dim). States have a
    field ``position``, the tokens seen.

    Args:
        num_heads: query heads; a key head's keys are mapped once for each of its query heads.
        head_dim: width of q and k.
        num_kv_heads: key and value heads; as many as query heads when omitted.
        value_dim: width of v; ``head_dim`` when omitted.
        feature_map: a name in ``seqmodels.mixers.feature_maps.FEATURE_MAPS``.
        feature_dim, init, bias, shared: of the learned maps; see
            :class:`~seqmodels.mixers.feature_maps.LearnedMap`.
        tied: one map for queries and keys.

    Attributes:
        query_map, key_map: the maps; ``key_map`` is None when tied, see :meth:`maps`.
    """

    bidirectional: bool = False

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        value_dim: int | None = None,
        feature_map: str,
        feature_dim: int | None = None,
        init: Initialization | None = None,
        bias: bool = False,
        shared: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.value_dim = head_dim if value_dim is None else value_dim
        check_divides(name, "num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        check_positive(name, head_dim=head_dim, value_dim=self.value_dim)
        options = {"feature_dim": feature_dim, "init": init, "bias": bias, "shared": shared}
        self.query_map = make_feature_map(name, feature_map, num_heads, head_dim, **options)
        # None, not a second name for one module: a state dict would hold its parameters twice.
        self.key_map = None if tied else make_feature_map(name, feature_map, num_heads, head_dim, **options)
        if self.query_map.op is None:
            raise ValueError(
                f"{name}: feature_map={feature_map!r} has no fused form, which this layer runs on; "
                "LinearAttention takes any map"
            )

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """The map of queries and the map of keys."""
        return self.query_map, self.query_map if self.key_map is None else self.key_map

    def linear_weights(self, q: Tensor, k: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """phi(q_i) . phi(k_j) (batch, heads, L, L), zero where j is not visible, and the visible pairs
        (batch, 1, L, L). By the quadratic form, for training the maps and for looking at them; a factor for
        each query may be left out."""
        heads = self.num_heads // k.shape[2]
        valid = None if layout is None else layout.valid
        phi_q, phi_k = paired_features(*self.maps(), q, k.repeat_interleave(heads, dim=2), valid)
        with torch.autocast(q.device.type, enabled=False):
            weights = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k)
        visible = visible_pairs(q, layout, causal=not self.bidirectional)
        return weights * visible, visible


def visible_pairs(x: Tensor, layout: Layout | None, *, causal: bool) -> Tensor:
    """(batch or 1, 1, L, L): True where token j is visible to token i."""
    length = x.shape[1]
    visible = torch.ones((1, 1, length, length), dtype=torch.bool, device=x.device)
    if causal:
        visible = visible.tril()
    if layout is None:
        return visible
    document = layout.document[:, None]
    return visible & (document[..., :, None] == document[..., None, :]) & layout.valid[:, None, None]


class CoreMixer(Mixer):
    r"""Base of layers around an :class:`AttentionCore`: W_o core(R W_q x, R W_k x, W_v x), R rotary positions.

    Subclasses make ``self.core``.
    """

    core: Any

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        rotary_fraction: float,
        rotary_base: float,
        bias: bool,
    ) -> None:
        super().__init__(d_model)
        name = type(self).__name__
        check_positive(name, num_heads=num_heads)
        if head_dim is None:
            check_divides(name, "num_heads", num_heads, "d_model", d_model)
            head_dim = d_model // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divides(name, "num_kv_heads", num_kv_heads, "num_heads", num_heads)
        check_positive(name, head_dim=head_dim)
        if not 0 <= rotary_fraction <= 1:
            raise ValueError(f"{name}: rotary_fraction is {rotary_fraction!r}; expected 0 (no positions) to 1")
        if not rotary_base > 0:
            raise ValueError(f"{name}: rotary_base is {rotary_base!r}; expected a positive number")
        self.rotary_dim, self.rotary_base = int(rotary_fraction * head_dim), float(rotary_base)
        if self.rotary_dim % 2:
            raise ValueError(
                f"{name}: rotary_fraction={rotary_fraction} of head_dim={head_dim} rotates {self.rotary_dim} entries; "
                "rotation takes pairs, so expected an even number"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, d_model, bias=bias)

    def project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (..., heads, head_dim), q and k turned to their positions (as ``token_positions`` gives them)."""
        q, k, v = (
            linear(x).unflatten(-1, (heads, self.head_dim))
            for linear, heads in (
                (self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads), (self.v_proj, self.num_kv_heads)
            )
        )  # fmt: skip
        if self.rotary_dim:
            tables = rotary_tables(position, self.rotary_dim, base=self.rotary_base, dtype=q.dtype)
            q, k = rotary(q, *tables), rotary(k, *tables)
        return q, k, v

    def forward(
        self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        if state is not None:
            self.check_state(state, x.shape[0] if layout is None else layout.num_documents)
        position = token_positions(x, None if state is None else state.position, layout)
        q, k, v = self.project(x, position)
        y, after = self.core(q, k, v, state, layout=layout, return_state=return_state)
        return MixerOutput(self.out_proj(y.flatten(-2)), after)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: Any) -> Tensor:
        q, k, v = self.project(x_t, state.position)
        return self.out_proj(self.core.step(q, k, v, state).flatten(-2))

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The state before the first token, whatever the context length."""
        weight = self.q_proj.weight
        device = weight.device if device is None else device
        return self.core.init_state(batch_size, device=device, dtype=weight.dtype if dtype is None else dtype)

    def flops(self, length: int) -> int:
        return super().flops(length) + self.core.flops(length)

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, rotary_dim={self.rotary_dim}"
        )
