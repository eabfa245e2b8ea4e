"""Prefix linear attention: the mixer of the JRT-RNN."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Causality, MixerOutput
from seqmodels.mixers.linear_attention import LinearAttention, LinearAttentionState
from seqmodels.ops.feature_attention import FeatureState, feature_attention, feature_state


class PrefixLinearAttention(LinearAttention):
    r"""Linear attention whose state starts from a second reading of the prefix.

    For each head, with the first M tokens of a document as its prefix, phi the Taylor map of width f,
    and all of q, k, v, k', v' linear in x without biases:

    .. code-block:: text

        S_0 = sum_{j<M} phi(k'_j) v'_j^T                  z_0 = sum_{j<M} phi(k'_j)
        S_t = S_{t-1} + phi(k_t) v_t^T                    z_t = z_{t-1} + phi(k_t)
        y_t = phi(q_t) S_t / (phi(q_t) z_t + epsilon)     for every t, also inside the prefix

    so that each token reads the whole prefix through the encoder's k' and v', and the past through the
    decoder's k and v, under one normaliser (JRT, arXiv:2407.05483, section 4.1). phi(q) . phi(k) is
    1 + s + s^2 / 2 with s = q . k / sqrt(f), at least 1/2, so the normaliser is never near zero.

    M is a document's entry in ``layout.prefix_lengths`` (all of a shorter document). The call that has a
    document's first token must have its whole prefix. Without a layout, without prefix lengths, and in
    ``step``, M is 0: causal linear attention that goes on from the state. Padding counts nowhere, so that
    a padded row equals the row alone; ``layout.compat_mask`` marks tokens whose keys are set to zero
    *before* phi, as released checkpoints do with padding: they still add phi(0) = (1, 0, ...).

    Args:
        d_model: width of the residual stream.
        num_heads: heads.
        feature_dim: f, width of a head's q, k and k' before the map.
        value_dim: width of a head's v and v'. Default: d_model / num_heads.
        epsilon: added to the normaliser.

    State: ``matrix`` (batch, heads, 1 + f + f (f + 1) / 2, value_dim + 1), float32: that of causal
    linear attention.
    """

    causality: ClassVar[Causality] = "prefix"

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        feature_dim: int = 16,
        value_dim: int | None = None,
        epsilon: float = 1e-12,
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            key_dim=feature_dim,
            value_dim=value_dim,
            feature_map="taylor",
            epsilon=epsilon,
        )
        self.encoder_k_proj = nn.Linear(d_model, num_heads * self.key_dim, bias=False)
        self.encoder_v_proj = nn.Linear(d_model, num_heads * self.value_dim, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LinearAttentionState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        if state is not None:
            self.check_state(state, x.shape[0] if layout is None else layout.num_documents)
        before = None if state is None else FeatureState(state.matrix, None)
        if layout is not None and layout.prefix_lengths is not None:
            k, v = self._read(x, self.encoder_k_proj, self.encoder_v_proj, layout)
            before = feature_state(k, v, feature_map="taylor", initial_state=before, layout=layout.prefixes())
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        k, v = self._read(x, self.k_proj, self.v_proj, layout)
        y, final = feature_attention(
            q, k, v, feature_map="taylor", initial_state=before, epsilon=self.epsilon, layout=layout
        )
        return MixerOutput(self._output(y, x), LinearAttentionState(final.matrix) if return_state else None, {})

    def _read(self, x: Tensor, k_proj: nn.Linear, v_proj: nn.Linear, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """k (batch, length, heads, feature_dim) before its map, and v (batch, length, heads, value_dim)."""
        k = k_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        if layout is not None and layout.compat_mask is not None:
            k = k.masked_fill(layout.compat_mask[..., None, None], 0)
        return k, v_proj(x).unflatten(-1, (self.num_heads, self.value_dim))

    def flops(self, length: int) -> int:
        """As if the whole sequence were prefix."""
        features, width = self.query_map.output_dim, self.value_dim + 1
        return super().flops(length) + 2 * length * self.num_heads * features * width
