"""Softmax attention by FlexAttention on a GPU: documents, windows and caches in one masked call.

The whole batch is one sequence of queries and one of keys (:mod:`seqmodels.ops.attention.sequence`).
Blocks of 128 x 128 that cannot hold a visible pair are skipped; which ones is found from the
documents' ranges and the order of the grid, never from a length x length mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from seqmodels.layout import Layout
from seqmodels.ops.attention.sequence import one_sequence, visible

BLOCK = 128
_NARROWEST = 16  # PyTorch's kernels multiply tiles of at least this width


def refusal(q: Tensor) -> str | None:
    """Why FlexAttention cannot take these tensors, or None."""
    if q.dtype == torch.float64:
        return "FlexAttention computes in float32, bfloat16 and float16, not float64"
    if q.shape[-1] < _NARROWEST:
        return f"FlexAttention needs a head_dim of at least {_NARROWEST}; it is {q.shape[-1]}"
    return None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Outside a compiled model FlexAttention must be compiled by itself, or it builds all scores."""
    return torch.compile(flex_attention, dynamic=True)


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
    one = one_sequence(q, k, v, key_cache, value_cache, position, layout, pinned, edge=BLOCK)
    query_document, query_position, key_document, key_position, keys, values, cached = one

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = query_document[query] == key_document[key]
        return visible(same, query_position[query], key_position[key], window, bidirectional, pinned)

    needed = needed_blocks(
        query_document, key_document, cached, window, bidirectional, key_position < pinned if pinned else None
    )
    count = needed.sum(-1, dtype=torch.int32)
    order = needed.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        count[None, None],
        order[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(query_document.shape[0], key_document.shape[0]),
    )
    run = flex_attention if torch.compiler.is_compiling() else _compiled()
    y = run(
        q.flatten(0, 1).transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    y = y[0].transpose(0, 1).reshape(q.shape)
    return y if layout is None else torch.where(layout.valid[:, :, None, None], y, 0)


def needed_blocks(
    query_document: Tensor,
    key_document: Tensor,
    cached: int,
    window: int | None,
    bidirectional: bool = False,
    pinned: Tensor | None = None,
) -> Tensor:
    """(query blocks, key blocks) bool: False only where no pair is visible.

    Args:
        query_document: (tokens,) document of each query, negative for padding.
        key_document: (cached + tokens,) document of each key, negative for keys nobody sees.
        cached: cached keys in front, a multiple of the block.
        pinned: (cached + tokens,) bool, keys that the window does not hide.
    """
    query_low, query_high = _document_ranges(query_document)
    key_low, key_high = _document_ranges(key_document)
    needed = (query_low[:, None] <= key_high) & (key_low <= query_high[:, None])
    # New tokens stand in the order of the grid, and inside a document positions differ as grid
    # indices do; cached keys are all in the past.
    query_first = torch.arange(query_low.shape[0], device=needed.device)[:, None] * BLOCK
    key_first = torch.arange(key_low.shape[0], device=needed.device) * BLOCK - cached
    if not bidirectional or window is not None:
        ahead = window - 1 if bidirectional and window is not None else 0
        needed = needed & (key_first <= query_first + BLOCK - 1 + ahead)
    if window is not None:
        near = (key_first + BLOCK - 1 >= query_first - (window - 1)) | (key_first < 0)
        if pinned is not None:
            near = near | _in_blocks(pinned & (key_document >= 0), False).any(1)
        needed = needed & near
    return needed


def _document_ranges(document: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest document in each block; an empty range where there is none."""
    blocks = _in_blocks(document, -1)
    low = torch.where(blocks < 0, torch.iinfo(torch.int64).max, blocks).amin(1)
    return low, blocks.amax(1).clamp(min=-1)


def _in_blocks(values: Tensor, fill: int | bool) -> Tensor:
    """(blocks, BLOCK), the last block filled up."""
    return torch.nn.functional.pad(values, (0, -values.shape[0] % BLOCK), value=fill).view(-1, BLOCK)
