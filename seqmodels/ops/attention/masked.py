"""Softmax attention under one mask in PyTorch: any device, any dtype, any width; memory grows with the square.

What a GPU falls back on where neither flash-attn nor FlexAttention takes the tensors (float64, heads below
16 wide), and what backend "torch" means there for documents, windows and caches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.attention.sequence import one_sequence, visible


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    layout: Layout | None,
    window: int | None,
    scale: float,
    bidirectional: bool,
    pinned: int = 0,
) -> Tensor:
    one = one_sequence(q, k, v, key_cache, value_cache, position, layout, pinned)
    inside = one.query_document >= 0
    same = one.query_document[:, None] == one.key_document
    mask = visible(same, one.query_position[:, None], one.key_position, window, bidirectional, pinned)
    # A padded query sees every key, all of them finite: a softmax of nothing would be NaN, and so its gradient.
    mask = mask | ~inside[:, None]
    held = (one.key_document >= 0)[:, None, None]
    queries = torch.where(inside[:, None, None], q.flatten(0, 1), 0)
    keys, values = (torch.where(held, tensor, 0) for tensor in (one.keys, one.values))
    y = F.scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (queries, keys, values)),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    y = y[0].transpose(0, 1)
    return torch.where(inside[:, None, None], y, 0).reshape(q.shape)
