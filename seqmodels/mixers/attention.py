"""Softmax attention: grouped-query heads, rotary positions, an optional sliding window."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, check_divides, check_positive
from seqmodels.ops.attention import append_to_cache, attention, attention_step, check_fits, empty_cache
from seqmodels.ops.rotary import rotary, rotary_tables, token_positions
from seqmodels.state import State


class AttentionState(State):
    """The key-value cache of :class:`Attention`, slots as in ``seqmodels.ops.attention.cache``; empty ones are zero."""

    key: Tensor  # (batch, num_kv_heads, capacity, head_dim), rotated
    value: Tensor  # (batch, num_kv_heads, capacity, head_dim)
    position: Tensor  # (batch,) int64, tokens seen by each row


class Attention(Mixer):
    r"""Softmax attention, causal unless told.

    .. code-block:: text

        q, k, v = split(W_in x);   q, k rotated by their position in the document
        y_i = W_out sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j   over i - window < j <= i

    With ``bidirectional`` the sum is over |i - j| < window; with ``pinned_tokens`` it is also over
    j < pinned_tokens, j <= i. Query head h reads key head
    h * num_kv_heads // num_heads. Positions count from a document's
    first token, so that padding and neighbours change nothing.

    The state holds keys (rotated) and values in the model's dtype: 2 num_kv_heads head_dim
    elements a token, for at most ``window`` and the pinned tokens, and one int64 position a row. With a
    window it never grows: the pinned tokens stay and the others are a ring. Without one it holds
    ``max_length`` tokens, and one more is an error.

    Args:
        d_model: width of x and y.
        num_heads: query heads.
        num_kv_heads: key and value heads, which divide ``num_heads``; as many when omitted.
        head_dim: width of a head; d_model / num_heads when omitted.
        window: visible keys, the token itself included; None: all. What papers call "a keys
            back" (flash-attn's (a, 0)) is ``a + 1`` here.
        pinned_tokens: first tokens of a document that every later one sees beside its window (attention sinks,
            arXiv:2309.17453).
        bidirectional: see both ways, ``window - 1`` keys on either side; no state and no step.
        rotary_fraction: part of each head's width that is rotated, its first entries, paired
            half-split (entry i with i + n / 2 of n rotated ones); 0 for no positions (NoPE).
        rotary_base: wavelengths go up to 2 pi times this.
        qk_norm: RMSNorm over head_dim of q and k before the rotation.
        bias: biases of both projections.

    Raises:
        ValueError: sizes below 1, heads that do not divide, a window below 1, pinned tokens without a window
            or with ``bidirectional``, a fraction outside [0, 1] or one that rotates an odd number of entries; a
            state or a step of a bidirectional layer.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        pinned_tokens: int = 0,
        bidirectional: bool = False,
        rotary_fraction: float = 1.0,
        rotary_base: float = 1e4,
        qk_norm: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        if window is not None:
            check_positive(name, window=window)
        if isinstance(pinned_tokens, bool) or not isinstance(pinned_tokens, int) or pinned_tokens < 0:
            raise ValueError(f"{name}: pinned_tokens is {pinned_tokens!r}; expected a number of tokens, 0 for none")
        if pinned_tokens and (window is None or bidirectional):
            raise ValueError(
                f"{name}: pinned_tokens is {pinned_tokens}; it is for a causal layer with a window, "
                "since others see the first tokens anyway"
            )
        if not 0 <= rotary_fraction <= 1:
            raise ValueError(f"{name}: rotary_fraction is {rotary_fraction!r}; expected 0 (no positions) to 1")
        if not rotary_base > 0:
            raise ValueError(f"{name}: rotary_base is {rotary_base!r}; expected a positive number")
        rotary_dim = int(rotary_fraction * head_dim)
        if rotary_dim % 2:
            raise ValueError(
                f"{name}: rotary_fraction={rotary_fraction} of head_dim={head_dim} rotates {rotary_dim} entries; "
                "rotation takes pairs, so expected an even number"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window, self.pinned_tokens = window, pinned_tokens
        self.bidirectional = bidirectional
        if bidirectional:
            self.causality = "bidirectional"  # type: ignore[misc]
        self.rotary_dim, self.rotary_base = rotary_dim, float(rotary_base)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, **options)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6, **options) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6, **options) if qk_norm else None
        self.out_proj = nn.Linear(num_heads * head_dim, d_model, bias=bias, **options)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        if self.bidirectional and (state is not None or return_state):
            self._refuse_state("carry a state")
        rows = x.shape[0] if layout is None else layout.num_documents
        keys, values, position = None, None, None
        if state is not None:
            self.check_state(state, rows, max_length=self._capacity_of(state))
            keys, values, position = state.key, state.value, state.position
        q, k, v, carried = self.heads(x, token_positions(x, position, layout), state, layout)
        y = attention(
            q, k, v, window=self.window, bidirectional=self.bidirectional, pinned=self.pinned_tokens, layout=layout,
            key_cache=keys, value_cache=values, position=position,
        )  # fmt: skip
        after = None
        if return_state:
            if state is None:
                state = self.init_state(rows, max_length=x.shape[1] if self.window is None else None, device=x.device)
            held = append_to_cache(
                state.key, state.value, state.position, k, v, layout=layout, pinned=self.pinned_tokens,
                wraps=not self._bounded(state),
            )  # fmt: skip
            after = type(state)(*held, *carried)
        return MixerOutput(self.out_proj(y.flatten(-2)), after)

    def check_room(self, state: AttentionState) -> None:
        """Refuses a step into a full cache. Reads the position, so it is for eager code on the CPU."""
        capacity = self._capacity_of(state)
        if self._bounded(state) and int(state.position.amax()) >= capacity:
            raise ValueError(
                f"{type(self).__name__}: {int(state.position.amax())} tokens are in a cache of {capacity}, so it is "
                "full; nothing was changed. Make the state with a larger max_length"
            )

    @torch.no_grad()
    def step(self, x_t: Tensor, state: AttentionState) -> Tensor:
        if self.bidirectional:
            self._refuse_state("take single steps")
        q, k, v = self.step_heads(x_t, state)
        y = attention_step(
            q, k, v, state.key, state.value, state.position, window=self.window, pinned=self.pinned_tokens
        )
        state.position.add_(1)
        return self.out_proj(y.flatten(-2))

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """An empty cache of ``max_length`` slots, at most ``window`` and ``pinned_tokens`` together.

        Raises:
            ValueError: without a window ``max_length`` is needed, since the cache never grows; a
                bidirectional layer has no state.
        """
        if self.bidirectional:
            self._refuse_state("carry a state")
        capacity = self._capacity(max_length)
        check_positive(type(self).__name__, batch_size=batch_size)
        weight = self.out_proj.weight
        device = weight.device if device is None else device
        options: dict[str, Any] = {"device": device, "dtype": weight.dtype if dtype is None else dtype}
        return AttentionState(
            empty_cache(batch_size, self.num_kv_heads, capacity, self.head_dim, **options),
            empty_cache(batch_size, self.num_kv_heads, capacity, self.head_dim, **options),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def with_capacity(self, state: AttentionState, max_length: int | None, *, shrink: bool = True) -> AttentionState:
        wanted, held = self._capacity(max_length), state.key.shape[2]
        if wanted < held:
            if not shrink:
                return state
            check_fits(state.position, wanted)
        change = (0, 0, 0, wanted - held)  # a negative number cuts
        return dataclasses.replace(state, key=F.pad(state.key, change), value=F.pad(state.value, change))

    def pin(self, count: int) -> None:
        if self.window is not None:
            self.pinned_tokens += count

    def state_bytes(self, context_length: int, *, batch_size: int = 1, dtype: torch.dtype | None = None) -> int:
        """Exact bytes of the state; 0 for a bidirectional layer, which has none."""
        return 0 if self.bidirectional else super().state_bytes(context_length, batch_size=batch_size, dtype=dtype)

    def flops(self, length: int) -> int:
        window = length if self.window is None else min(self.window, length)
        pairs = window * (window + 1) // 2 + (length - window) * window
        outside = length - window  # tokens whose window has left the first one behind
        near = min(outside, self.pinned_tokens)
        pairs += near * (near + 1) // 2 + (outside - near) * self.pinned_tokens
        if self.bidirectional:
            pairs = 2 * pairs - length  # the same keys ahead; the token itself once
        return super().flops(length) + 4 * self.num_heads * self.head_dim * pairs

    def heads(
        self, x: Tensor, position: Tensor, state: AttentionState | None, layout: Layout | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """q and k, rotated, and v of every token, and what a subclass carries in its state beside the cache."""
        if not self.rotary_dim and self.q_norm is None:  # one split, whose gradient is one concatenation, not two
            parts = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
            q, k, v = parts.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
            return q, k, v, ()
        qk, v = self.project(x)
        return *self.rotate(qk, position), v, ()

    def step_heads(self, x_t: Tensor, state: AttentionState) -> tuple[Tensor, Tensor, Tensor]:
        """q and k, rotated, and v of one token; what a subclass carries is updated in place."""
        qk, v = self.project(x_t)
        return *self.rotate(qk, state.position), v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k side by side (..., num_heads + num_kv_heads, head_dim), not rotated, and v."""
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.num_heads, self.num_kv_heads), dim=-2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=-2)
        return qk, v

    def rotate(self, qk: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, turned to their absolute positions: (length,), (batch, length), or (batch,) in a step."""
        if self.rotary_dim:
            qk = rotary(qk, *rotary_tables(position, self.rotary_dim, base=self.rotary_base, dtype=qk.dtype))
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=-2)
        return q, k

    def _refuse_state(self, what: str) -> None:
        raise ValueError(
            f"{type(self).__name__}: a bidirectional layer cannot {what}, since outputs depend on later tokens; "
            "build it with bidirectional=False"
        )

    def _bounded(self, state: AttentionState) -> bool:
        """Whether the cache holds so many tokens and no more."""
        return self.window is None or state.key.shape[2] < self.window + self.pinned_tokens

    def _capacity(self, max_length: int | None) -> int:
        """Slots of a cache for ``max_length`` tokens."""
        if max_length is None and self.window is None:
            raise ValueError(
                f"{type(self).__name__} without a window keeps every token, and its state never grows: "
                "give init_state(batch_size, max_length=...) the longest context, or the layer a window"
            )
        most = None if self.window is None else self.window + self.pinned_tokens
        return min(size for size in (max_length, most) if size is not None)

    def _capacity_of(self, state: Any) -> int:
        """The capacity that a given state claims; 1 for what is no such state, which the check refuses."""
        return state.key.shape[2] if isinstance(state, AttentionState) and state.key.dim() == 4 else 1

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"window={self.window}, pinned_tokens={self.pinned_tokens}, bidirectional={self.bidirectional}, "
            f"rotary_dim={self.rotary_dim}"
        )
