"""The whole batch as one sequence of queries and one of keys: what the masked forms on a GPU share.

Keys are [all caches, padding to a block edge, all new tokens], and each token carries a document number
and an absolute position in it, from the layout and the state, on the device. A key is visible where the
documents agree and

    key position <= query position < key position + window, or key position < pinned and <= query position,

or, for bidirectional attention, where the positions differ by less than the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.attention.cache import held_positions


class OneSequence(NamedTuple):
    """
    Attributes:
        query_document, query_position: (tokens,); document -1 for padding.
        key_document, key_position: (cached + tokens,); document -2 for keys that nobody sees.
        keys, values: (cached + tokens, key heads, head_dim).
        cached: cached keys in front, filled up to a multiple of the edge.
    """

    query_document: Tensor
    query_position: Tensor
    key_document: Tensor
    key_position: Tensor
    keys: Tensor
    values: Tensor
    cached: int


def one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    layout: Layout | None,
    pinned: int,
    edge: int = 1,
) -> OneSequence:
    """The arguments of :func:`seqmodels.ops.attention.attention` in this form; new tokens start at a multiple
    of ``edge``."""
    query_document, query_position = _tokens(q, position, layout)
    key_document, key_position = torch.where(query_document < 0, -2, query_document), query_position
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    cached = 0
    if key_cache is not None and value_cache is not None and position is not None:
        slot_document, slot_position = _slots(key_cache, position, pinned, edge)
        cached = slot_document.shape[0]
        key_document, key_position = torch.cat([slot_document, key_document]), torch.cat([slot_position, key_position])
        keys, values = (
            torch.cat([_padded(cache.transpose(1, 2).flatten(0, 1).to(new.dtype), cached), new])
            for cache, new in ((key_cache, keys), (value_cache, values))
        )
    return OneSequence(query_document, query_position, key_document, key_position, keys, values, cached)


def visible(
    same: Tensor, query_position: Tensor, key_position: Tensor, window: int | None, bidirectional: bool, pinned: int
) -> Tensor:
    """Does a query see a key? ``same``: they are of one document."""
    distance = query_position - key_position
    if bidirectional:
        distance = distance.abs()
    else:
        same = same & (distance >= 0)
    if window is None:
        return same
    near = distance < window
    return same & (near | (key_position < pinned) if pinned else near)


def _tokens(q: Tensor, position: Tensor | None, layout: Layout | None) -> tuple[Tensor, Tensor]:
    """Document and absolute position of each token of the grid, flat; document -1 for padding."""
    if layout is None:
        token = torch.arange(q.shape[0] * q.shape[1], device=q.device)
        document, index = token // q.shape[1], token % q.shape[1]
    else:
        document, index = layout.document.flatten(), layout.position.flatten()
    return document, index if position is None else index + position[document.clamp(min=0)]


def _slots(cache: Tensor, position: Tensor, pinned: int, edge: int) -> tuple[Tensor, Tensor]:
    """Document and position of each cached key, padded to the edge; document -2 for empty slots."""
    documents, capacity = cache.shape[0], cache.shape[2]
    token = held_positions(position, capacity, pinned).flatten()
    document = torch.arange(documents * capacity, device=cache.device) // capacity
    document = torch.where(token < 0, -2, document)
    padding = -document.shape[0] % edge
    return torch.nn.functional.pad(document, (0, padding), value=-2), torch.nn.functional.pad(token, (0, padding))


def _padded(tokens: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, count - tokens.shape[0]))
