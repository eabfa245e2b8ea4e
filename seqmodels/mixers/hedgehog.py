"""Hedgehog (arXiv:2402.04347): linear attention whose feature maps are learned to be spiky and monotone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.mixers.attention_core import AttentionCore, CoreMixer
from seqmodels.mixers.base import MixerOutput
from seqmodels.mixers.feature_maps import HedgehogExp, Initialization, fused
from seqmodels.ops.documents import chunk_table
from seqmodels.ops.feature_attention import FeatureState, feature_attention, feature_attention_step, feature_state
from seqmodels.state import State

_CHUNK = 64  # tokens that read one state together; also for the operation count


class HedgehogState(State):
    """The sum over keys of phi(k) [v, 1]^T, held as ``matrix`` e^{log_scale}; see ``FeatureState``."""

    matrix: Tensor  # (batch, heads, features, value_dim); one wider with the normaliser
    log_scale: Tensor | None  # (batch, heads, features) for the exponential map
    position: Tensor  # (batch,) int64, tokens seen


class HedgehogCore(AttentionCore):
    r"""Linear attention on given queries, keys and values, with a map of each per query head.

    .. code-block:: text

        A_ij = phi_q(q_i) . phi_k(k_j) / (sum_{j visible} phi_q(q_i) . phi_k(k_j) + epsilon),   y_i = sum_j A_ij v_j

    over j <= i, or over every token of the document with ``bidirectional``, where S = phi(K)^T [V, 1] is
    summed once. Hedgehog, section 4 (the maps) and equation 3. There is no 1 / sqrt(head_dim): the maps learn it.

    Args, besides those of :class:`~seqmodels.mixers.attention_core.AttentionCore`:
        normalize: divide by the sum of weights. The exponential map needs it, the identity forbids it.
        epsilon: added to the divisor; the map's own when omitted. A query that sees nothing, or only weights of
            zero (relu), gives 0. The exponential map takes none: its divisor cannot vanish.
        bidirectional: see both ways; no state and no step.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        feature_map: str = "hedgehog_exp",
        normalize: bool = True,
        epsilon: float | None = None,
        bidirectional: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_heads, head_dim, feature_map=feature_map, **options)
        name, exponential = type(self).__name__, isinstance(self.query_map, HedgehogExp)
        if normalize and not self.query_map.nonnegative:
            raise ValueError(
                f"{name}: normalize=True divides by a sum of weights, which feature_map={feature_map!r} does not "
                "keep positive; choose normalize=False or another map"
            )
        if exponential and not normalize:
            raise ValueError(
                f"{name}: feature_map={feature_map!r} needs normalize=True, since its scale cancels in a mean only; "
                "choose hedgehog_split or hedgehog_joint, whose features are bounded"
            )
        if epsilon is not None and (exponential or not epsilon > 0):
            raise ValueError(
                f"{name}: epsilon is {epsilon!r} with feature_map={feature_map!r}; expected a positive number, and "
                "none for the exponential map, whose divisor cannot vanish"
            )
        self.normalize, self.bidirectional = normalize, bidirectional
        self.epsilon = self.query_map.epsilon if epsilon is None else epsilon

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: HedgehogState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, HedgehogState | None]:
        if self.bidirectional:
            if state is not None or return_state:
                self._refuse_state("carry a state")
            return self._read_both_ways(q, k, v, layout), None
        before = None if state is None else FeatureState(state.matrix, state.log_scale)
        q, k, maps = fused(*self.maps(), q, k)
        y, after = feature_attention(
            q, k, v, initial_state=before, layout=layout, normalize=self.normalize, epsilon=self._op_epsilon, **maps
        )
        if not return_state:
            return y, None
        rows = q.shape[0] if layout is None else layout.num_documents
        new = q.new_full((rows,), q.shape[1], dtype=torch.int64) if layout is None else layout.lengths.clone()
        position = new if state is None else state.position + new
        return y, HedgehogState(after.matrix, after.log_scale, position)

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: HedgehogState) -> Tensor:
        if self.bidirectional:
            self._refuse_state("take single steps")
        carried = FeatureState(state.matrix, state.log_scale)
        q, k, maps = fused(*self.maps(), q, k)
        y = feature_attention_step(q, k, v, carried, normalize=self.normalize, epsilon=self._op_epsilon, **maps)
        state.position.add_(1)
        return y

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HedgehogState:
        if self.bidirectional:
            self._refuse_state("carry a state")
        like = torch.empty(0, device=device, dtype=dtype)
        width = getattr(self.query_map, "feature_dim", self.head_dim)
        empty = FeatureState.empty(
            like, batch_size, self.num_heads, width, self.value_dim, str(self.query_map.op), self.normalize
        )
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return HedgehogState(empty.matrix, empty.log_scale, position)

    def attention_weights(self, q: Tensor, k: Tensor, layout: Layout | None = None) -> Tensor:
        """A (batch, heads, L, L) by the quadratic form; zero where nothing is visible.

        Without ``normalize`` it is phi(q) . phi(k) itself.
        """
        weights, _ = self.linear_weights(q, k, layout)
        return weights / (weights.sum(-1, keepdim=True) + self.epsilon) if self.normalize else weights

    def flops(self, length: int) -> int:
        """The maps' products, the state's update and reading, and the products inside a chunk."""
        features, width = self.query_map.output_dim, self.value_dim + int(self.normalize)
        mapped = 4 * self.head_dim * getattr(self.query_map, "feature_dim", 0)
        inside = 0 if self.bidirectional else min(_CHUNK, length) * (features + width)
        return length * self.num_heads * (mapped + 4 * features * width + inside)

    @property
    def _op_epsilon(self) -> float | None:
        return None if isinstance(self.query_map, HedgehogExp) else self.epsilon

    def _read_both_ways(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None) -> Tensor:
        mapped, weight = self.maps()[1].operands(k)
        if weight is None:  # a weight says how many heads there are; without queries, k has to
            mapped = mapped.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        state = feature_state(
            mapped, v, weight, feature_map=str(self.query_map.op), normalize=self.normalize, layout=layout
        )
        with torch.autocast(q.device.type, enabled=False):
            if layout is None:
                return self._read(q, state.matrix, state.log_scale).to(v.dtype)
            # Chunks of one document each, so that every chunk reads one state.
            table = chunk_table(layout.starts, layout.lengths, q.shape[0] * q.shape[1], _CHUNK)
            scale = None if state.log_scale is None else state.log_scale[table.document]
            y = self._read(q.flatten(0, 1)[table.token], state.matrix[table.document], scale)
            rows = torch.where(table.valid, table.token, q.shape[0] * q.shape[1]).flatten()
            grid = y.new_zeros((q.shape[0] * q.shape[1] + 1, *y.shape[2:]))
            return grid.index_copy(0, rows, y.flatten(0, 1))[:-1].view(*q.shape[:2], *y.shape[2:]).to(v.dtype)

    def _read(self, q: Tensor, matrix: Tensor, log_scale: Tensor | None) -> Tensor:
        """What queries (rows, length, heads, head_dim) read from one state a row."""
        query_map = self.query_map
        if isinstance(query_map, HedgehogExp) and log_scale is not None:
            exponent = query_map.exponents(q) + log_scale[:, None]
            phi = (exponent - exponent.detach().amax(-1, keepdim=True)).exp()
        else:
            phi = query_map(q).to(matrix.dtype)
        y = torch.einsum("blhf,bhfp->blhp", phi, matrix)
        return y[..., :-1] / (y[..., -1:] + self.epsilon) if self.normalize else y

    def _refuse_state(self, what: str) -> None:
        raise ValueError(
            f"{type(self).__name__}: a bidirectional layer cannot {what}, since outputs depend on later tokens; "
            "build it with bidirectional=False"
        )


class Hedgehog(CoreMixer):
    r"""Linear attention with Hedgehog's learned feature maps.

    .. code-block:: text

        q, k, v = W_q x, W_k x, W_v x;   q, k rotated by their position on request
        y = W_o HedgehogCore(q, k, v)

    The maps work on the projections after rotation, unscaled. Query head h reads key head
    h * num_kv_heads // num_heads and maps its keys itself, so that the state has a row for every query head.

    Args:
        d_model: width of x and y.
        num_heads, num_kv_heads, head_dim: as in Attention.
        feature_map: "hedgehog_exp" [exp u, exp -u], "hedgehog_split" (a softmax each), "hedgehog_joint" (one
            softmax), "hedgehog_joint_doubled", "t2r", or a fixed one ("taylor", "elu", "relu", "identity").
        feature_dim: f, the width of u = x W; head_dim when omitted.
        init: of W, "identity" or "kaiming".
        map_bias: u = x W + b.
        shared: one W for all heads.
        tied: one map for queries and keys.
        normalize, epsilon, bidirectional: see :class:`HedgehogCore`.
        rotary_fraction, rotary_base: as in Attention, but 0 (no positions) by default.
        bias: biases of the four projections.

    State (causal): ``matrix`` (batch, heads, features, head_dim + 1), float32; ``log_scale`` (batch, heads,
    features) for hedgehog_exp; ``position``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: str = "hedgehog_exp",
        feature_dim: int | None = None,
        init: Initialization | None = None,
        map_bias: bool = False,
        shared: bool = False,
        tied: bool = False,
        normalize: bool = True,
        epsilon: float | None = None,
        bidirectional: bool = False,
        rotary_fraction: float = 0.0,
        rotary_base: float = 1e4,
        bias: bool = False,
    ) -> None:
        super().__init__(
            d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            rotary_fraction=rotary_fraction, rotary_base=rotary_base, bias=bias,
        )  # fmt: skip
        if bidirectional:
            self.causality = "bidirectional"  # type: ignore[misc]
        self.core = HedgehogCore(
            num_heads, self.head_dim, num_kv_heads=self.num_kv_heads, feature_map=feature_map,
            feature_dim=feature_dim, init=init, bias=map_bias, shared=shared, tied=tied, normalize=normalize,
            epsilon=epsilon, bidirectional=bidirectional,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        state: HedgehogState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        if self.core.bidirectional and state is not None:
            self.core._refuse_state("carry a state")
        return super().forward(x, state, layout=layout, return_state=return_state)

    def state_bytes(self, context_length: int, *, batch_size: int = 1, dtype: torch.dtype | None = None) -> int:
        """Exact bytes of the state, whatever the context length; 0 for a bidirectional layer, which has none."""
        if self.core.bidirectional:
            return 0
        return super().state_bytes(context_length, batch_size=batch_size, dtype=dtype)
