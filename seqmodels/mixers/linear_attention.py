"""Linear attention with a choice of feature map and decay."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, ParameterHint, check_divides, check_positive
from seqmodels.mixers.feature_maps import FEATURE_MAPS, HedgehogExp, fused
from seqmodels.ops.feature_attention import FeatureState, feature_attention, feature_attention_step
from seqmodels.ops.linear_attention import linear_attention, linear_attention_step
from seqmodels.ops.registration import state_dtype
from seqmodels.state import State

Decay = Literal["none", "fixed", "data_dependent"]
_CHUNK = 64  # tokens, for the operation count


class LinearAttentionState(State):
    matrix: Tensor  # (batch, heads, features, value_dim); one wider with the normaliser
    log_scale: Tensor | None = None  # (batch, heads, features) for hedgehog_exp; see FeatureState


class LinearAttention(Mixer):
    r"""Multi-head linear attention.

    For each head, with q, k, v linear in x and phi the feature map:

    .. code-block:: text

        S_t = e^{g_t} S_{t-1} + phi(k_t) v_t^T
        y_t = phi(q_t) S_t            or, normalised,   phi(q_t) S_t / (phi(q_t) z_t + epsilon)

    where z_t accumulates phi(k_t) with the same decay. The output is W_o y, of y normalised per
    head (``output_norm``) and times silu(W_g x) (``gate``) on request.

    Args:
        d_model: width of the residual stream.
        num_heads: heads.
        key_dim: width of a head's q and k before the feature map. Default: d_model / num_heads.
        value_dim: width of a head's v. Default: d_model / num_heads.
        feature_map: a name in ``seqmodels.mixers.feature_maps.FEATURE_MAPS``. q and k have a map each. The library's
            own are computed inside the kernel; one of yours, or ``taylor_full``, in front of it.
        decay: ``"none"``; ``"fixed"``: head h forgets at the rate e^g = 1 - 2^(-5 - h) (RetNet,
            arXiv:2307.08621, section 2.3), capped at h = 7; ``"data_dependent"``: g_t =
            -softplus(w_h . x_t + b_h), b such that time scales start between 10 and 1000 tokens.
        normalize: divide by the sum of the weights. Needs a map with weights of one sign.
        output_norm: RMS norm over each head's output.
        gate: multiply the output by silu(W_g x).
        epsilon: added to the normaliser.

    State: ``matrix`` (batch, heads, features, value_dim (+ 1 with ``normalize``)), float32; ``log_scale`` (batch,
    heads, features) with hedgehog_exp.
    """

    parameter_hints: ClassVar[dict[str, ParameterHint]] = {"decay_bias": ParameterHint(weight_decay=0.0)}
    #: Fixed decay: head h forgets at e^g = 1 - 2^(-fixed_exponent - min(h, fixed_cap)).
    fixed_exponent: ClassVar[int] = 5
    fixed_cap: ClassVar[int | None] = 7

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: str = "elu",
        decay: Decay = "none",
        normalize: bool = True,
        output_norm: bool = False,
        gate: bool = False,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        name = type(self).__name__
        check_positive(name, num_heads=num_heads)
        if key_dim is None or value_dim is None:
            check_divides(name, "num_heads", num_heads, "d_model", d_model)
        self.num_heads = num_heads
        self.key_dim = d_model // num_heads if key_dim is None else key_dim
        self.value_dim = d_model // num_heads if value_dim is None else value_dim
        check_positive(name, key_dim=self.key_dim, value_dim=self.value_dim)
        if decay not in ("none", "fixed", "data_dependent"):
            raise ValueError(f"{name}: decay is {decay!r}; expected 'none', 'fixed' or 'data_dependent'")
        if not epsilon > 0:
            raise ValueError(f"{name}: epsilon is {epsilon}; expected a positive number, added to the normaliser")
        make_map = FEATURE_MAPS[feature_map]
        if normalize and not make_map.nonnegative:
            raise ValueError(
                f"{name}: normalize=True divides by a sum of weights, which feature_map={feature_map!r} does not "
                "keep positive; choose normalize=False (with output_norm=True to bound the output) or another map"
            )
        if issubclass(make_map, HedgehogExp) and not (normalize and decay == "none"):
            raise ValueError(
                f"{name}: feature_map={feature_map!r} needs normalize=True and decay='none', since its scale cancels "
                "in a mean of all tokens only; choose hedgehog_split or hedgehog_joint"
            )
        self.decay, self.normalize, self.epsilon = decay, normalize, epsilon
        keys, values = num_heads * self.key_dim, num_heads * self.value_dim
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.query_map = make_map(num_heads, self.key_dim)
        self.key_map = make_map(num_heads, self.key_dim)
        if decay == "data_dependent":
            self.decay_proj = nn.Linear(d_model, num_heads, bias=False)
            self.decay_bias = nn.Parameter(torch.empty(num_heads))
        else:
            self.register_parameter("decay_bias", None)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5) if output_norm else None
        self.gate_proj = nn.Linear(d_model, values, bias=False) if gate else None
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws ``decay_bias`` so that softplus of it is log-uniform in [0.001, 0.1]."""
        if self.decay == "data_dependent":
            rate = torch.empty_like(self.decay_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            self.decay_bias.copy_(rate + torch.log(-torch.expm1(-rate)))

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
        q, k, v, log_decay = self._project(x)
        if self.query_map.op is None:
            y, final = linear_attention(
                self.query_map(q).to(v.dtype), self.key_map(k).to(v.dtype), v, log_decay,
                initial_state=None if state is None else state.matrix,
                normalize=self.normalize, epsilon=self.epsilon, layout=layout,
            )  # fmt: skip
            after = LinearAttentionState(final)
        else:
            q, k, options = self._fused(q, k)
            before = None if state is None else FeatureState(state.matrix, state.log_scale)
            y, final = feature_attention(q, k, v, log_decay=log_decay, initial_state=before, layout=layout, **options)
            after = LinearAttentionState(final.matrix, final.log_scale)
        return MixerOutput(self._output(y, x), after if return_state else None, {})

    @torch.no_grad()
    def step(self, x_t: Tensor, state: LinearAttentionState) -> Tensor:
        q, k, v, log_decay = self._project(x_t)
        if self.query_map.op is None:
            q, k = self.query_map(q).to(v.dtype), self.key_map(k).to(v.dtype)
            y = linear_attention_step(q, k, v, log_decay, state.matrix, normalize=self.normalize, epsilon=self.epsilon)
        else:
            q, k, options = self._fused(q, k)
            carried = FeatureState(state.matrix, state.log_scale)
            y = feature_attention_step(q, k, v, carried, log_decay=log_decay, **options)
        return self._output(y, x_t)

    def _fused(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """q, k and the options by which the fused op applies this layer's maps."""
        q, k, options = fused(self.query_map, self.key_map, q, k)
        exponential = isinstance(self.query_map, HedgehogExp)  # its divisor cannot vanish: no epsilon
        return q, k, {**options, "normalize": self.normalize, "epsilon": None if exponential else self.epsilon}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(..., d_model) to q, k (..., heads, key_dim), v (..., heads, value_dim), log decay (..., heads)."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        if self.decay == "none":
            return q, k, v, None
        dtype = state_dtype(x.dtype)  # decays stay out of half precision
        if self.decay == "fixed":
            # A few numbers, made anew: a buffer would lose precision in a cast to bfloat16.
            head = torch.arange(self.num_heads, device=x.device, dtype=dtype)
            if self.fixed_cap is not None:
                head = head.clamp_max(self.fixed_cap)
            return q, k, v, torch.log1p(-torch.exp2(-self.fixed_exponent - head)).expand(*x.shape[:-1], self.num_heads)
        return q, k, v, -softplus(self.decay_proj(x).to(dtype) + self.decay_bias.to(dtype))

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        if self.norm is not None:  # the weight in y's dtype: autocast leaves it in float32
            y = rms_norm(y, self.norm.normalized_shape, self.norm.weight.to(y.dtype), self.norm.eps)
        y = y.flatten(-2)
        if self.gate_proj is not None:
            y = y * silu(self.gate_proj(x))
        return self.out_proj(y)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LinearAttentionState:
        weight, query_map = self.q_proj.weight, self.query_map
        like = torch.empty(0, device=weight.device if device is None else device, dtype=dtype or weight.dtype)
        if query_map.op is None:
            shape = (batch_size, self.num_heads, query_map.output_dim, self.value_dim + int(self.normalize))
            return LinearAttentionState(like.new_zeros(shape, dtype=state_dtype(like.dtype)))
        width = getattr(query_map, "feature_dim", self.key_dim)
        empty = FeatureState.empty(
            like, batch_size, self.num_heads, width, self.value_dim, query_map.op, self.normalize
        )
        return LinearAttentionState(empty.matrix, empty.log_scale)

    def flops(self, length: int) -> int:
        features, width = self.query_map.output_dim, self.value_dim + int(self.normalize)
        chunk = min(_CHUNK, length)
        return super().flops(length) + length * self.num_heads * (4 * features * width + chunk * (features + width))
