"""The teacher: softmax attention with a padding mask, its output and its weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from seqmodels.convert.hedgehog.runtime import AttentionCall


def visible(call: AttentionCall) -> Tensor:
    """(1 or batch, queries, keys) bool: which keys each query may see.

    A query on padding sees itself, so that no row of a softmax is empty; nothing reads its output.
    """
    index = torch.arange(call.q.shape[1], device=call.q.device)
    key, query = index[None], index[:, None]
    allowed = (key <= query if call.causal else (key >= 0).expand(len(index), -1))[None]
    if call.key_mask is not None:
        allowed = (allowed & call.key_mask[:, None]) | (key == query)
    return allowed


def softmax_output(call: AttentionCall) -> Tensor:
    """softmax(scaling q k^T) v, (batch, length, heads, width)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in _every_head(call))
    plain = call.key_mask is None
    mask = None if plain else visible(call)[:, None]
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain and call.causal, scale=call.scaling)
    return y.transpose(1, 2)


def softmax_weights(call: AttentionCall) -> Tensor:
    """(batch, heads, queries, keys) weights, float32 (float64)."""
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    q, k, _ = (tensor.transpose(1, 2).to(dtype) for tensor in _every_head(call))
    scores = (q @ k.mT) * call.scaling
    return scores.masked_fill(~visible(call)[:, None], float("-inf")).softmax(dim=-1)


def _every_head(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    groups = call.q.shape[2] // call.k.shape[2]
    return call.q, call.k.repeat_interleave(groups, dim=2), call.v.repeat_interleave(groups, dim=2)
