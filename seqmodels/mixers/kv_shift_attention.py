"""KV-shifting attention: softmax attention whose keys and values are mixed with the token before."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.attention import Attention, AttentionState
from seqmodels.mixers.base import ParameterHint
from seqmodels.ops.kv_shift import kv_shift, kv_shift_step
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.rotary import rotary, rotary_tables

Shift = Literal["kv", "k", "v", "qkv"]
Weights = Literal["free", "gate", "clamp"]


class KVShiftState(AttentionState):
    """The cache of shifted keys (rotated) and values, and the raw projections that the next token needs."""

    last: Tensor  # (batch, shift_width - 1, shifted heads, head_dim), before shift, norm and rotation, oldest first


class KVShiftAttention(Attention):
    r"""Causal softmax attention over shifted keys and values (arXiv:2411.19574, section 3).

    .. code-block:: text

        kh_t = a1 k_t + a2 k_{t-1},   vh_t = b1 v_t + b2 v_{t-1}        k_{-1} = v_{-1} = 0
        y_i  = W_out sum_j softmax_j(R_i q_i . R_j kh_j / sqrt(head_dim)) vh_j

    with four scalars for each key head, R the rotation. So one layer finds the token that followed
    an earlier copy of the current one (an induction head), for which plain attention needs two
    layers. The shift comes before qk_norm and the rotation: k_{t-1} is turned to position t.

    The state is the one of :class:`Attention` and the last raw keys and values.

    Args:
        d_model, num_heads, num_kv_heads, head_dim, window, pinned_tokens, rotary_fraction, rotary_base, qk_norm,
            bias: as in :class:`Attention`.
        shift: what is shifted: ``"kv"``, the ablations ``"k"`` and ``"v"``, or ``"qkv"``.
        weights: ``"free"``: a1 drawn from U(0, 1), a2 = 1 - a1, both learned without constraint;
            ``"gate"``: a1 = sigmoid(g), a2 = 1 - a1; ``"clamp"``: free, clamped to [0, 1].
        shift_width: tokens mixed, the current one included; those beyond the second start at 0.

    Parameters ``k_mix`` and ``v_mix`` (num_kv_heads, shift_width), ``q_mix`` (num_heads, shift_width):
    column 0 is the current token, column 1 the previous one; (heads, 1), the logit g, for ``"gate"``.

    Raises:
        ValueError: an unknown ``shift`` or ``weights``; ``shift_width`` below 2, or above 2 with ``"gate"``.
    """

    q_mix: nn.Parameter | None
    k_mix: nn.Parameter | None
    v_mix: nn.Parameter | None
    parameter_hints: ClassVar[dict[str, ParameterHint]] = {
        name: ParameterHint(weight_decay=0.0) for name in ("q_mix", "k_mix", "v_mix")
    }

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        pinned_tokens: int = 0,
        rotary_fraction: float = 1.0,
        rotary_base: float = 1e4,
        qk_norm: bool = False,
        bias: bool = False,
        shift: Shift = "kv",
        weights: Weights = "free",
        shift_width: int = 2,
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
        if shift not in ("kv", "k", "v", "qkv"):
            raise ValueError(f"{name}: shift is {shift!r}; expected 'kv', 'k', 'v' or 'qkv'")
        if weights not in ("free", "gate", "clamp"):
            raise ValueError(f"{name}: weights is {weights!r}; expected 'free', 'gate' or 'clamp'")
        if shift_width < 2 or (weights == "gate" and shift_width != 2):
            raise ValueError(
                f"{name}: shift_width is {shift_width}; expected 2 or more tokens, the current one included"
                + (", and 2 with weights='gate', whose two weights sum to 1" if weights == "gate" else "")
            )
        self.shift, self.weights, self.shift_width = shift, weights, shift_width
        self._sizes = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        self._groups = "qkv".partition(shift)
        columns = 1 if weights == "gate" else shift_width
        for part, heads in self._sizes.items():
            mix = nn.Parameter(torch.empty(heads, columns, **options)) if part in shift else None
            self.register_parameter(f"{part}_mix", mix)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws each current weight from U(0, 1), with the previous token's the rest of 1."""
        for mix in (self.q_mix, self.k_mix, self.v_mix):
            if mix is None:
                continue
            current = torch.empty_like(mix[:, 0]).uniform_()
            if self.weights == "gate":
                mix[:, 0] = torch.logit(current, eps=1e-6)
            else:
                mix.zero_()
                mix[:, 0], mix[:, 1] = current, 1 - current

    def mix(self) -> Tensor:
        """The weights in force, (shifted heads, shift_width), in the order q, k, v."""
        mix = torch.cat([part for part in (self.q_mix, self.k_mix, self.v_mix) if part is not None])
        if self.weights == "gate":
            return torch.cat([mix.sigmoid(), (-mix).sigmoid()], dim=-1)
        return mix.clamp(0, 1) if self.weights == "clamp" else mix

    def heads(
        self, x: Tensor, position: Tensor, state: AttentionState | None, layout: Layout | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        last = state.last if isinstance(state, KVShiftState) else None
        raw = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        before, chosen, after = self._pieces(raw)
        shifted, last = kv_shift(chosen, self.mix(), initial_state=last, layout=layout)
        return *self._assemble((before, shifted, after), position), (last,)

    def step_heads(self, x_t: Tensor, state: AttentionState) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(state, KVShiftState)
        raw = self.in_proj(x_t).unflatten(-1, (-1, self.head_dim))
        before, chosen, after = self._pieces(raw)
        shifted = kv_shift_step(chosen, self.mix(), state.last)
        return self._assemble((before, shifted, after), state.position)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVShiftState:
        cache = super().init_state(batch_size, max_length=max_length, device=device, dtype=dtype)
        heads = sum(self._sizes[part] for part in self.shift)
        last = torch.zeros(
            (batch_size, self.shift_width - 1, heads, self.head_dim),
            device=cache.key.device, dtype=state_dtype(cache.key.dtype),
        )  # fmt: skip
        return KVShiftState(cache.key, cache.value, cache.position, last)

    def _pieces(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Views of the heads before the shifted ones, of those, and of the rest: q, k, v stand side by side.

        One split, whose backward is one concatenation; slices would each fill a tensor of zeros.
        """
        return raw.split([sum(self._sizes[part] for part in parts) for parts in self._groups], dim=-2)

    def _assemble(self, pieces: tuple[Tensor, ...], position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads: list[Tensor] = []
        for parts, piece in zip(self._groups, pieces, strict=True):
            heads += piece.split([self._sizes[part] for part in parts], dim=-2) if parts else ()
        q, k, v = heads
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_dim:
            tables = rotary_tables(position, self.rotary_dim, base=self.rotary_base, dtype=q.dtype)
            q, k = rotary(q, *tables), rotary(k, *tables)
        return q, k, v

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift!r}, weights={self.weights!r}, shift_width={self.shift_width}"
