"""Based (arXiv:2402.18668): linear attention with the second-order Taylor expansion of the exponential."""

from __future__ import annotations

from typing import ClassVar, Literal

from seqmodels.mixers.linear_attention import LinearAttention


class Based(LinearAttention):
    r"""Linear attention of weights 1 + s + s^2 / 2, s = q . k / sqrt(feature_dim), over their sum.

    .. code-block:: text

        y_i = W_o sum_{j<=i} a_ij v_j / (sum_{j<=i} a_ij + epsilon),   a_ij = e^{(i-j) g} (1 + s_ij + s_ij^2 / 2)

    Section 4.1 of the paper, whose model puts this layer beside sliding-window attention and gated convolutions
    (here the layers ``attention`` with a window and ``gated_conv``). The state has 1 + f + f (f + 1) / 2 rows of
    value_dim + 1 a head: equal coordinates' products are stored once, which changes no output.

    Args:
        d_model: width of the residual stream.
        num_heads: heads.
        feature_dim: f, width of a head's q and k.
        value_dim: width of a head's v; d_model / num_heads when omitted.
        decay: "none", or "fixed": head h forgets at the rate e^g = 1 - 2^(-3 - h), in the numerator and in the
            normaliser, so that y stays a weighted mean.
        epsilon: added to the normaliser, which is at least 1/2.
    """

    fixed_exponent: ClassVar[int] = 3
    fixed_cap: ClassVar[int | None] = None

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 16,
        feature_dim: int = 16,
        value_dim: int | None = None,
        decay: Literal["none", "fixed"] = "none",
        epsilon: float = 1e-12,
    ) -> None:
        if decay not in ("none", "fixed"):
            raise ValueError(f"{type(self).__name__}: decay is {decay!r}; expected 'none' or 'fixed'")
        super().__init__(
            d_model, num_heads=num_heads, key_dim=feature_dim, value_dim=value_dim, feature_map="taylor",
            decay=decay, epsilon=epsilon,
        )  # fmt: skip
