"""The attention function that transformers calls in a converted model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from seqmodels.convert.hedgehog.cache import layer_of
from seqmodels.convert.hedgehog.cores import Place, attend, make_call
from seqmodels.convert.hedgehog.masks import check_two_dimensional, key_mask
from seqmodels.convert.hedgehog.softmax import softmax_output

IMPLEMENTATION = "seqmodels_hedgehog"  # value of config._attn_implementation


def converted_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer by its ``linear_core``; softmax where it has none.

    Dropout on attention weights is not applied: there are no weights to drop.

    Args:
        query: (batch, heads, new tokens, width), rotated.
        key, value: (batch, key heads, new tokens, width); a cache gives no older ones.
        attention_mask: what :func:`~seqmodels.convert.hedgehog.masks.key_mask` made.

    Returns:
        (batch, new tokens, heads, width), and the weights (batch, heads, queries, keys) where they were asked for.
    """
    core = getattr(module, "linear_core", None)
    if core is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    check_two_dimensional(attention_mask)
    layer = layer_of(key)
    length = query.shape[2]
    if key.shape[2] != length:
        raise ValueError(
            f"{length} queries came with {key.shape[2]} keys; a converted layer takes the new tokens alone, with what "
            "was before them in a HedgehogCache"
        )
    place: Place = module.hedgehog_place
    runtime = place.runtime
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    new = None if attention_mask is None else attention_mask[:, -length:]
    call = make_call(core, query, key, value, scale, new, place.causal)
    if runtime.observer is not None:
        teacher = softmax_output(call)
        runtime.observer(place.layer, core, call, teacher)
        return teacher, None
    state = None if layer is None else layer.state
    weights = None
    if runtime.return_weights:
        if state is not None:
            raise ValueError(
                "output_attentions shows weights on every earlier token, which a linear state no longer holds; run the "
                "whole sequence in one forward without past_key_values"
            )
        weights = core.attention_weights(call.q, call.k, call.layout()).to(query.dtype)
    y, state = attend(core, call, state, return_state=layer is not None)
    if layer is not None and state is not None:
        layer.store(state)
    return y.to(query.dtype), weights


AttentionInterface.register(IMPLEMENTATION, converted_attention)
AttentionMaskInterface.register(IMPLEMENTATION, key_mask)
