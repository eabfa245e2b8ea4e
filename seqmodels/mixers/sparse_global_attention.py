"""Sparse global attention: a sliding window and the best-scored tokens of earlier blocks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.attention import Attention, AttentionState
from seqmodels.mixers.base import MixerOutput, ParameterHint, check_positive
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.rotary import token_positions
from seqmodels.ops.sparse_attention import SparseCache, advance, empty, sparse_attention, sparse_attention_step


class SparseGlobalState(AttentionState):
    """A ring of ``window`` keys and values, and the chosen tokens; fields as in ``SparseCache``."""

    recent_score: Tensor  # (batch, block); infinite for pinned tokens, as in global_score
    global_key: Tensor  # (batch, num_kv_heads, num_globals and pinned, head_dim), rotated at true positions
    global_value: Tensor  # (batch, num_kv_heads, num_globals, head_dim)
    global_score: Tensor  # (batch, num_globals)
    global_position: Tensor  # (batch, num_globals) int64, -1 where empty

    def canonical(self) -> SparseGlobalState:
        """Without the infinite scores of pinned tokens, whose differences would be NaN."""
        scores = (torch.where(score.isinf(), 0, score) for score in (self.recent_score, self.global_score))
        return dataclasses.replace(self, **dict(zip(("recent_score", "global_score"), scores, strict=True)))


class SparseGlobalAttention(Attention):
    r"""Causal attention over a window and ``num_globals`` scored tokens of earlier blocks (Hydra's SGA).

    .. code-block:: text

        s_j = w_s . x_j + b_s                                       in float32
        y_t = W_out sum_j softmax_j(q_t . k_j / sqrt(head_dim) + [j is global] log sigmoid(s_j)) v_j

    over the last ``window`` tokens and, beyond them, the best tokens by s among those before the
    query's block (arXiv:2508.15099 names the parts; the causal rule, block by block, is ours:
    choosing over the whole sequence would let later tokens push earlier ones out). The cost is
    linear in the length, and the state does not grow.

    Args:
        d_model, num_heads, num_kv_heads, head_dim, rotary_fraction, rotary_base, qk_norm, bias: as in
            :class:`Attention`.
        window: visible neighbours, the token itself included; at least ``block``.
        pinned_tokens: first tokens of a document that are always chosen, beside ``num_globals`` others, and whose
            logits get nothing added.
        num_globals: chosen tokens a block sees, 0 for none. More than there are tokens means all of them.
        block: queries that share one choice.

    Raises:
        ValueError: a window below the block, and what :class:`Attention` refuses.
    """

    parameter_hints: ClassVar[dict[str, ParameterHint]] = {"score_bias": ParameterHint(weight_decay=0.0)}

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 256,
        pinned_tokens: int = 0,
        num_globals: int = 512,
        block: int = 128,
        rotary_fraction: float = 1.0,
        rotary_base: float = 1e4,
        qk_norm: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window,
            pinned_tokens=pinned_tokens, rotary_fraction=rotary_fraction, rotary_base=rotary_base, qk_norm=qk_norm,
            bias=bias, **options,
        )  # fmt: skip
        name = type(self).__name__
        check_positive(name, block=block)
        if num_globals < 0:
            raise ValueError(f"{name}: num_globals is {num_globals}; expected 0 (the window alone) or more")
        if window < block:
            raise ValueError(
                f"{name}: window is {window} and block {block}; expected a window of at least a block, since a "
                "block's tokens are chosen when it ends and must still be kept then"
            )
        self.num_globals, self.block = num_globals, block
        self.score_weight = nn.Parameter(torch.empty(d_model, **options))
        self.score_bias = nn.Parameter(torch.empty(1, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws ``score_weight`` from N(0, 1 / d_model); a bias of 2 leaves chosen keys nearly unweighted at first."""
        self.score_weight.normal_(std=1 / math.sqrt(self.d_model))
        self.score_bias.fill_(2.0)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        rows = x.shape[0] if layout is None else layout.num_documents
        cache = None
        if state is not None:
            self.check_state(state, rows)
            assert isinstance(state, SparseGlobalState)
            cache = _cache(state)
        position = token_positions(x, None if cache is None else cache.position, layout)
        qk, v = self.project(x)
        q, k = self.rotate(qk, position)
        scores = self._pinned(self.scores(x), position)
        y = sparse_attention(
            q, k, v, scores, window=self._window, num_globals=self._chosen, block=self.block, cache=cache,
            layout=layout,
        )  # fmt: skip
        after = None
        if return_state:
            if cache is None:
                cache = _cache(self.init_state(rows, device=x.device))
            after = SparseGlobalState(*advance(cache, k, v, scores, layout=layout))
        return MixerOutput(self.out_proj(y.flatten(-2)), after)

    def check_room(self, state: AttentionState) -> None:
        """There is always room: the ring wraps and the chosen tokens are a fixed number."""

    @torch.no_grad()
    def step(self, x_t: Tensor, state: AttentionState) -> Tensor:
        assert isinstance(state, SparseGlobalState)
        qk, v = self.project(x_t)
        q, k = self.rotate(qk, state.position)
        y = sparse_attention_step(q, k, v, self._pinned(self.scores(x_t), state.position), _cache(state))
        return self.out_proj(y.flatten(-2))

    def scores(self, x: Tensor) -> Tensor:
        """s of each token, (...,) float32 (float64). A product and a sum over neighbours in memory, so that a token
        alone gets the bits that it gets in a sequence, and decode chooses what training chose."""
        dtype = state_dtype(x.dtype)
        return (x.to(dtype).contiguous() * self.score_weight.to(dtype)).sum(-1) + self.score_bias.to(dtype)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SparseGlobalState:
        """An empty state; its size does not depend on ``max_length``."""
        check_positive(type(self).__name__, batch_size=batch_size)
        weight = self.out_proj.weight
        return SparseGlobalState(
            *empty(
                batch_size, self.num_kv_heads, self.head_dim, window=self._window, num_globals=self._chosen,
                block=self.block, device=weight.device if device is None else device,
                dtype=weight.dtype if dtype is None else dtype,
            )
        )  # fmt: skip

    def flops(self, length: int) -> int:
        local = min(length, self._window)
        chosen = min(length, self._window + self.num_globals) - local  # the base counts the window and what is pinned
        return super().flops(length) + 4 * length * self.num_heads * self.head_dim * chosen

    def with_capacity(self, state: AttentionState, max_length: int | None, *, shrink: bool = True) -> AttentionState:
        return state  # its size depends on no length

    def _pinned(self, scores: Tensor, position: Tensor) -> Tensor:
        """The best score for pinned tokens: they are always chosen, and log sigmoid of it adds 0 to a logit."""
        return scores.masked_fill(position < self.pinned_tokens, math.inf) if self.pinned_tokens else scores

    @property
    def _chosen(self) -> int:
        return self.num_globals + self.pinned_tokens

    @property
    def _window(self) -> int:
        assert self.window is not None
        return self.window

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_globals={self.num_globals}, block={self.block}"


def _cache(state: SparseGlobalState) -> SparseCache:
    return SparseCache(
        state.key, state.value, state.position, state.recent_score, state.global_key, state.global_value,
        state.global_score, state.global_position,
    )  # fmt: skip
