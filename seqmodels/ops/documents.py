"""Documents in a grid of tokens, as index tables of fixed capacity.

Ops get documents as ``starts`` and ``lengths`` (see :class:`seqmodels.Layout`). The helpers here
turn them into tables that kernels and gathers can use. Table sizes depend on shapes alone, never
on the values, so nothing is read on the host and a new batch recompiles nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenTable(NamedTuple):
    """Where each token of the (batch, length) grid belongs; all (batch, length).

    Attributes:
        document: slot of the token's document; 0 for padding, so that it can index.
        valid: False on padding.
        first: True on the first token of a document.
        last: True on the last token of a document.
    """

    document: Tensor
    valid: Tensor
    first: Tensor
    last: Tensor


def token_table(starts: Tensor, lengths: Tensor, batch_size: int, length: int) -> TokenTable:
    """The document of every token of a (batch_size, length) grid."""
    flat = torch.arange(batch_size * length, device=starts.device)
    document = (torch.searchsorted(starts, flat, right=True) - 1).clamp_min(0)
    position = flat - starts[document]
    size = lengths[document]
    valid = (position >= 0) & (position < size)
    tables = (document * valid, valid, valid & (position == 0), valid & (position == size - 1))
    return TokenTable(*(table.view(batch_size, length) for table in tables))


class ChunkTable(NamedTuple):
    """Documents cut into chunks of at most Q tokens; a chunk never spans two documents.

    There are T = batch * length // Q + documents slots, which always suffices. Chunks stand in
    document order, so that a chunk's predecessor in its document is the slot before it.

    Attributes:
        token: (T, Q) flat index ``row * length + column`` of each token; 0 where not ``valid``.
        valid: (T, Q), False behind a document's end and in unused slots.
        document: (T,) slot of the chunk's document; 0 in unused slots, so that it can index.
        first: (T,) True where a chunk opens its document (and in unused slots).
        last: (documents,) index of each document's last chunk; 0 for empty documents.
    """

    token: Tensor
    valid: Tensor
    document: Tensor
    first: Tensor
    last: Tensor


def chunk_table(starts: Tensor, lengths: Tensor, num_tokens: int, chunk_size: int) -> ChunkTable:
    """Cuts every document into chunks of ``chunk_size`` tokens; ``num_tokens`` is batch * length."""
    documents = starts.shape[0]
    slots = num_tokens // chunk_size + documents
    counts = (lengths + chunk_size - 1) // chunk_size
    ends = counts.cumsum(0)
    chunk = torch.arange(slots, device=starts.device)
    document = torch.searchsorted(ends, chunk, right=True)
    used = document < documents
    document = document * used
    index_in_document = chunk - (ends - counts)[document]
    position = index_in_document[:, None] * chunk_size + torch.arange(chunk_size, device=starts.device)
    valid = used[:, None] & (position < lengths[document][:, None])
    token = (starts[document][:, None] + position) * valid
    return ChunkTable(token, valid, document, ~used | (index_in_document == 0), (ends - 1) * (counts > 0))


class AlignedBlocks(NamedTuple):
    """Documents cut at positions 0, S, 2S, ... counted from their first token ever, T blocks in document order.

    A document that goes on inside a block begins here with the rest of it, and the slots before are the past.

    Attributes:
        token: (T, S) flat index ``row * length + column`` of each slot's token; -1 where it is not among these.
        position: (T, S) position in the document, of the past too; 0 behind the document's end.
        filled: (T, S) False behind the document's end and in unused blocks.
        document: (T,) slot of the block's document; 0 in unused blocks.
        used: (T,) False for spare blocks.
        first: (T,) True where a block is its document's first here (and in unused blocks).
        last: (documents,) each document's last block here; 0 for empty documents.
        slot_of_token: (batch * length,) where each token stands in the flattened (T, S), -1 on padding.
    """

    token: Tensor
    position: Tensor
    filled: Tensor
    document: Tensor
    used: Tensor
    first: Tensor
    last: Tensor
    slot_of_token: Tensor


def aligned_blocks(
    starts: Tensor | None, lengths: Tensor | None, seen: Tensor, batch_size: int, length: int, block: int
) -> AlignedBlocks:
    """Cuts documents at multiples of ``block``; ``seen`` (documents,) int64 tokens of each came before.

    There are batch * length // block + 2 * documents rows, which always suffices.
    """
    tokens, device = batch_size * length, seen.device
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=device) * length
        lengths = torch.full_like(starts, length)
    # A document that goes on is given the tokens it lacks at the front of its first block.
    offset = seen % block * (lengths > 0)
    chunks = chunk_table(starts - offset, lengths + offset, tokens + starts.shape[0] * block, block)
    index = chunks.token - starts[chunks.document][:, None]  # among the new tokens, negative for the past
    position = torch.where(chunks.valid, index + seen[chunks.document][:, None], 0)
    token = torch.where(chunks.valid & (index >= 0), chunks.token, -1)
    slot = torch.arange(token.numel(), device=device)
    slot_of_token = torch.full((tokens + 1,), -1, device=device)  # one more, for the slots without a token
    slot_of_token = slot_of_token.scatter(0, torch.where(token < 0, tokens, token).flatten(), slot)[:-1]
    return AlignedBlocks(
        token, position, chunks.valid, chunks.document, chunks.valid.any(1), chunks.first, chunks.last, slot_of_token
    )
