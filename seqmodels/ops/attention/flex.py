"""Softmax attention by FlexAttention on a GPU: documents, windows and caches in one masked call.

The whole batch is one sequence. Keys are [all caches, padding to a block edge, all new tokens],
and each token carries a document number and an absolute position in it, from the layout and the
state, on the device. A key is visible where the documents agree and

    key position <= query position < key position + window, or key position < pinned and <= query position,

or, for bidirectional attention, where the positions differ by less than the window.

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
from seqmodels.ops.attention.cache import held_positions

BLOCK = 128


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
    query_document, query_position = _tokens(q, position, layout)
    key_document, key_position = torch.where(query_document < 0, -2, query_document), query_position
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    cached = 0
    if key_cache is not None and value_cache is not None and position is not None:
        slot_document, slot_position = _slots(key_cache, position, pinned)
        cached = slot_document.shape[0]
        key_document, key_position = torch.cat([slot_document, key_document]), torch.cat([slot_position, key_position])
        keys, values = (
            torch.cat([_padded(cache.transpose(1, 2).flatten(0, 1).to(new.dtype), cached), new])
            for cache, new in ((key_cache, keys), (value_cache, values))
        )

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query_position[query] - key_position[key]
        result = query_document[query] == key_document[key]
        if bidirectional:
            distance = distance.abs()
        else:
            result = result & (distance >= 0)
        if window is None:
            return result
        near = distance < window
        return result & (near | (key_position[key] < pinned) if pinned else near)

    needed = needed_blocks(
        query_document, key_document, cached, window, bidirectional, key_position < pinned if pinned else None
    )
    count = needed.sum(-1, dtype=torch.int32)
    order = needed.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        count[None, None],
        order[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
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


def _tokens(q: Tensor, position: Tensor | None, layout: Layout | None) -> tuple[Tensor, Tensor]:
    """Document and absolute position of each token of the grid, flat; document -1 for padding."""
    if layout is None:
        token = torch.arange(q.shape[0] * q.shape[1], device=q.device)
        document, index = token // q.shape[1], token % q.shape[1]
    else:
        document, index = layout.document.flatten(), layout.position.flatten()
    return document, index if position is None else index + position[document.clamp(min=0)]


def _slots(cache: Tensor, position: Tensor, pinned: int) -> tuple[Tensor, Tensor]:
    """Document and position of each cached key, padded to a block; document -2 for empty slots."""
    documents, capacity = cache.shape[0], cache.shape[2]
    token = held_positions(position, capacity, pinned).flatten()
    document = torch.arange(documents * capacity, device=cache.device) // capacity
    document = torch.where(token < 0, -2, document)
    padding = -document.shape[0] % BLOCK
    return torch.nn.functional.pad(document, (0, padding), value=-2), torch.nn.functional.pad(token, (0, padding))


def _padded(tokens: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, count - tokens.shape[0]))
