"""LoLCATs (arXiv:2410.10254): softmax attention over a sliding window, linear attention over what came before."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from seqmodels.layout import Layout
from seqmodels.mixers.attention_core import AttentionCore, CoreMixer
from seqmodels.mixers.base import ParameterHint, check_positive
from seqmodels.mixers.feature_maps import HedgehogExp, Initialization, fused
from seqmodels.ops.attention import append_to_cache, empty_cache
from seqmodels.ops.feature_attention import FeatureState, feature_attention, feature_attention_step
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.window_linear_attention import (
    evicted_tokens,
    window_linear_attention,
    window_linear_attention_step,
)
from seqmodels.state import State

LinearFactor = Literal["one", "complement"]
_CHUNK = 64  # tokens of a chunk of the linear branch, for the operation count
_INITIAL_GAMMA = 0.1


class HedgehogWindowState(State):
    """The window's keys and values, and the sum over the tokens that have left it."""

    key: Tensor  # (batch, num_kv_heads, window, head_dim), rotated; slot p mod window holds position p, empty is 0
    value: Tensor  # (batch, num_kv_heads, window, value_dim)
    matrix: Tensor  # (batch, heads, features, value_dim + 1), float32
    position: Tensor  # (batch,) int64, tokens seen


class HedgehogWindowCore(AttentionCore):
    r"""Window and linear attention under one normaliser, on given queries, keys and values.

    With s_ij = q_i . k_j / sqrt(head_dim), c_i its largest value in the window, gamma = sigmoid(g) for each head,
    and lambda = 1 or 1 - gamma:

    .. code-block:: text

        num_i = gamma sum_{i-w < j <= i} e^{s_ij - c_i} v_j + lambda sum_{j <= i-w} phi_q(q_i) . phi_k(k_j) v_j
        den_i = gamma sum_{i-w < j <= i} e^{s_ij - c_i}     + lambda sum_{j <= i-w} phi_q(q_i) . phi_k(k_j)
        y_i   = num_i / den_i

    LoLCATs, section 3.3 and equation 6; the linear terms are not scaled by e^{-c_i}, as published. The window slides
    by one token, in a sequence as in decoding. A window that holds the whole document is softmax attention for
    every gamma.

    The paper's other window ("terrace": a token's own block of w tokens and the one before) is left out: a decode
    step would move w tokens into the sum at once at every block's end, or read a window that the sequence did not
    have (the released code does the latter, and computes another function in decoding than in training).

    Args, besides those of :class:`~seqmodels.mixers.attention_core.AttentionCore`:
        window: w, the visible keys, the token itself included.
        linear_factor: lambda, "one" or "complement" (1 - gamma).

    Attributes:
        window_logit: (heads,) g, at first ln(1/9): gamma = 0.1.
        window_weight, linear_weight: further factors of the two parts, 1. Set one to 0 to see what the other
            does alone; where nothing is left y is 0.
    """

    parameter_hints: ClassVar[dict[str, ParameterHint]] = {"window_logit": ParameterHint(weight_decay=0.0)}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        window: int = 64,
        linear_factor: LinearFactor = "one",
        feature_map: str = "hedgehog_split",
        **options: Any,
    ) -> None:
        super().__init__(num_heads, head_dim, feature_map=feature_map, **options)
        name = type(self).__name__
        check_positive(name, window=window)
        if linear_factor not in ("one", "complement"):
            raise ValueError(f"{name}: linear_factor is {linear_factor!r}; expected 'one' or 'complement' (1 - gamma)")
        if isinstance(self.query_map, HedgehogExp) or not self.query_map.nonnegative:
            raise ValueError(
                f"{name}: feature_map={feature_map!r} has no bounded scale of weights at least 0, which the normaliser "
                "shared with the softmax window needs; choose hedgehog_split or hedgehog_joint"
            )
        self.window, self.linear_factor = window, linear_factor
        self.window_weight = self.linear_weight = 1.0
        self.window_logit = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """g of gamma = 0.1; the maps keep theirs."""
        self.window_logit.fill_(math.log(_INITIAL_GAMMA / (1 - _INITIAL_GAMMA)))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gamma and lambda (heads,) with ``window_weight`` and ``linear_weight``, in the state's dtype."""
        gamma = self.window_logit.to(state_dtype(dtype)).sigmoid()
        linear = torch.ones_like(gamma) if self.linear_factor == "one" else 1 - gamma
        return gamma * self.window_weight, linear * self.linear_weight

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: HedgehogWindowState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, HedgehogWindowState | None]:
        rings: dict[str, Any] = {}
        if state is not None:
            rings = {"key_cache": state.key, "value_cache": state.value, "position": state.position}
        before = None if state is None else FeatureState(state.matrix, None)
        old_k, old_v = evicted_tokens(k, v, window=self.window, layout=layout, **rings)
        mapped_q, mapped_k, maps = fused(*self.maps(), q, old_k)
        past, after = feature_attention(
            mapped_q, mapped_k, old_v, initial_state=before, normalize=False, layout=layout, **maps
        )
        gamma, linear = self.factors(q.dtype)
        y = window_linear_attention(
            q, k, v, past.to(linear.dtype) * linear[:, None], gamma, window=self.window, layout=layout, **rings
        )
        if not return_state:
            return y, None
        if state is None:
            rows = q.shape[0] if layout is None else layout.num_documents
            state = self.init_state(rows, device=q.device, dtype=k.dtype)
        held = append_to_cache(state.key, state.value, state.position, k, v, layout=layout)
        return y, HedgehogWindowState(held[0], held[1], after.matrix, held[2])

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: HedgehogWindowState) -> Tensor:
        slot = (state.position % self.window).view(-1, 1, 1, 1)
        old_k, old_v = (
            ring.gather(2, slot.expand(-1, ring.shape[1], 1, ring.shape[3])).squeeze(2).to(q.dtype)
            for ring in (state.key, state.value)
        )
        # An empty slot is zero, but phi(0) is not: no value and no one for the normaliser.
        leaves = (state.position >= self.window).to(q.dtype).view(-1, 1, 1)
        old_v = pad(old_v, (0, 1), value=1.0) * leaves
        mapped_q, mapped_k, maps = fused(*self.maps(), q, old_k)
        past = feature_attention_step(
            mapped_q, mapped_k, old_v, FeatureState(state.matrix, None), normalize=False, **maps
        )
        gamma, linear = self.factors(q.dtype)
        past = past.to(linear.dtype) * linear[:, None]
        y = window_linear_attention_step(q, k, v, past, gamma, state.key, state.value, state.position)
        state.position.add_(1)
        return y

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HedgehogWindowState:
        made: dict[str, Any] = {"device": device, "dtype": torch.get_default_dtype() if dtype is None else dtype}
        shape = (batch_size, self.num_heads, self.query_map.output_dim, self.value_dim + 1)
        return HedgehogWindowState(
            empty_cache(batch_size, self.num_kv_heads, self.window, self.head_dim, **made),
            empty_cache(batch_size, self.num_kv_heads, self.window, self.value_dim, **made),
            torch.zeros(shape, device=device, dtype=state_dtype(made["dtype"])),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def attention_weights(self, q: Tensor, k: Tensor, layout: Layout | None = None) -> Tensor:
        """A (batch, heads, L, L), both parts over their common normaliser, by the quadratic form."""
        length = q.shape[1]
        linear, visible = self.linear_weights(q, k, layout)
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        near = visible & (distance < self.window)
        gamma, factor = (x.view(-1, 1, 1) for x in self.factors(q.dtype))
        with torch.autocast(q.device.type, enabled=False):
            wide = state_dtype(q.dtype)
            keys = k.to(wide).repeat_interleave(self.num_heads // k.shape[2], dim=2)
            scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), keys) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(~near, float("-inf"))
        largest = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = gamma * (scores - largest).exp() + factor * linear * (distance >= self.window)
        return weights / (weights.sum(-1, keepdim=True) + 1e-30)

    def flops(self, length: int) -> int:
        """The window's pairs, the maps' products, the state's update and reading, and the products in a chunk."""
        window = min(self.window, length)
        pairs = window * (window + 1) // 2 + (length - window) * window
        features, width = self.query_map.output_dim, self.value_dim + 1
        linear = 4 * self.head_dim * getattr(self.query_map, "feature_dim", 0) + 4 * features * width
        linear += min(_CHUNK, length) * (features + width)
        return self.num_heads * (2 * (self.head_dim + self.value_dim) * pairs + length * linear)


class HedgehogWindow(CoreMixer):
    r"""Softmax attention over a sliding window and Hedgehog's linear attention over what came before it.

    .. code-block:: text

        q, k, v = W_q x, W_k x, W_v x;   q, k rotated by their position
        y = W_o HedgehogWindowCore(q, k, v)

    Args:
        d_model: width of x and y.
        num_heads, num_kv_heads, head_dim, rotary_fraction, rotary_base: as in Attention.
        window: visible keys, the token itself included.
        linear_factor: "one", or "complement" for 1 - gamma.
        feature_map: a map of bounded weights at least 0: "hedgehog_split", "hedgehog_joint",
            "hedgehog_joint_doubled", or "t2r", "taylor", "elu", "relu".
        feature_dim, init, map_bias, shared, tied: of the maps, as in Hedgehog.
        bias: biases of the four projections.

    State: ``key`` and ``value`` rings of ``window`` tokens in the model's dtype, ``matrix`` float32, ``position``;
    its size does not depend on the context length.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 64,
        linear_factor: LinearFactor = "one",
        feature_map: str = "hedgehog_split",
        feature_dim: int | None = None,
        init: Initialization | None = None,
        map_bias: bool = False,
        shared: bool = False,
        tied: bool = False,
        rotary_fraction: float = 1.0,
        rotary_base: float = 1e4,
        bias: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary_fraction=rotary_fraction,
            rotary_base=rotary_base,
            bias=bias,
        )
        self.core = HedgehogWindowCore(
            num_heads,
            self.head_dim,
            num_kv_heads=self.num_kv_heads,
            window=window,
            linear_factor=linear_factor,
            feature_map=feature_map,
            feature_dim=feature_dim,
            init=init,
            bias=map_bias,
            shared=shared,
            tied=tied,
        )

    def pin(self, count: int) -> None:
        raise ValueError(
            f"{type(self).__name__}: a token that leaves the window joins the linear sums, so {count} first tokens "
            "cannot stay in it; take attention with a window, or hedgehog, which has none"
        )
