"""Which tokens each block of queries may reach beyond its window. No gradient: indices only.

Positions of a document are cut into blocks of S from position 0 on. The queries of block b choose
among positions below b S, so that no token changes a choice made before it: the best G by score,
the earlier one where scores are equal. The lists of all blocks are a prefix scan of "merge two
sorted lists and keep G", done in log2(blocks of a row) rounds.

The tables are made by a registered op, so that a compiled model sees one node whatever the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator
from seqmodels.ops.sparse_attention.state import SparseCache


class BlockTables(NamedTuple):
    """T blocks of S positions; "source" is a row of ``state.universe``, -1 where there is none.

    Attributes:
        token: (T, S) flat index of each query in the grid, -1 where the slot holds no new token.
        position: (T, S) its position in the document.
        local_source: (T, S + w - 1) keys from the first query's window on, in order of position.
        global_source: (T, G) the chosen keys.
        global_position: (T, G), -1 where there is none.
        final_source, final_position: (documents, G), the choice that the next whole block would have.
    """

    token: Tensor
    position: Tensor
    local_source: Tensor
    global_source: Tensor
    global_position: Tensor
    final_source: Tensor
    final_position: Tensor


def select_globals(
    scores: Tensor, *, num_globals: int, block: int, cache: SparseCache | None = None, layout: Layout | None = None
) -> tuple[Tensor, Tensor]:
    """The positions that each block of queries may reach beyond its window, the best first.

    Args:
        scores: (batch, length).

    Returns:
        token: (blocks, block), the flat index of each query in the grid, -1 for none.
        position: (blocks, num_globals), positions in the query's document, -1 for none.
    """
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    window = block if cache is None else cache.key.shape[2]
    tables = block_tables(scores, starts, lengths, cache, window, num_globals, block)
    return tables.token, tables.global_position


def block_tables(
    scores: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    cache: SparseCache | None,
    window: int,
    num_globals: int,
    block: int,
) -> BlockTables:
    """The tables for ``scores`` (batch, length), which get no gradient by them."""
    carried = (None,) * 4 if cache is None else (
        cache.position, cache.recent_score, cache.global_score, cache.global_position
    )  # fmt: skip
    carried = tuple(None if tensor is None else tensor.detach() for tensor in carried)
    return BlockTables(*_operator(scores.detach(), starts, lengths, *carried, window, num_globals, block))


def _fake(
    scores: Tensor, starts: Tensor | None, lengths: Tensor | None, position: Tensor | None,
    recent_score: Tensor | None, global_score: Tensor | None, global_position: Tensor | None,
    window: int, num_globals: int, block: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    documents = scores.shape[0] if starts is None else starts.shape[0]
    blocks = scores.shape[0] * scores.shape[1] // block + 2 * documents
    shapes = [(blocks, block)] * 2 + [(blocks, window + block - 1)] + [(blocks, num_globals)] * 2
    return tuple(scores.new_empty(s, dtype=torch.int64) for s in [*shapes, *[(documents, num_globals)] * 2])


_PACKAGE = "seqmodels.ops.sparse_attention"
_operator = Operator(
    "sparse_attention_tables",
    "Tensor scores, Tensor? starts, Tensor? lengths, Tensor? position, Tensor? recent_score, Tensor? global_score, "
    "Tensor? global_position, int window, int num_globals, int block",
    outputs=7,
    fake=_fake,
    modules={name: f"{_PACKAGE}.tables" for name in ("reference", "torch", "cpu", "triton")},  # integers: one way
)
