"""Language-model batches from a token cache: packed rows with document boundaries.

An epoch is the documents in shuffled order, one after another, cut into rows of
``sequence_length`` tokens; the rows are then shuffled too. Each row therefore is full (no
padding, every target counts), and a document's tokens see only that document. A batch is a pure
function of the configuration and of one integer, the number of rows consumed, which is all that
a checkpoint stores to go on exactly where it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.tasks.corpus import CorpusError
from seqmodels.tasks.shuffle import hashed_order, permutation
from seqmodels.tasks.token_cache import TokenCache

_DOCUMENTS, _ROWS = 0, 1  # streams of the shuffle


class TextBatch(NamedTuple):
    """``tokens`` and ``targets``: (rows, sequence_length) int64; ``lengths``: each row's document lengths;
    ``masked``: (rows, prefix) bool where a prefix objective masks tokens."""

    tokens: Tensor
    targets: Tensor
    lengths: list[list[int]]
    masked: Tensor | None = None

    def layout(self, capacity: int | None = None) -> Layout:
        return Layout.packed(self.lengths, self.tokens.shape[1], capacity=capacity)


def split_documents(cache: TokenCache, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and held-out documents (ascending), whole files on either side.

    ``round(fraction * documents)`` documents, at least one, are held out: those whose name hashes
    lowest. Documents never move between the sides because of their content or order.

    Raises:
        CorpusError: a fraction above zero and a single document.
    """
    count = len(cache.names)
    if fraction == 0:
        return np.arange(count), np.arange(0)
    if count < 2:
        raise CorpusError(
            f"the corpus is one document ({cache.names[0]!r}) and cannot be split by file; "
            "set data.validation to another file, or data.validation_fraction=0 to train without validation"
        )
    held_out = min(max(1, round(fraction * count)), count - 1)
    order = hashed_order(cache.names, seed)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class PackedText:
    """Rows of packed documents, addressed by number; epoch after epoch without end."""

    def __init__(
        self, cache: TokenCache, documents: np.ndarray, sequence_length: int, *, seed: int, shuffle: bool = True
    ) -> None:
        self.cache = cache
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self._lengths = np.diff(cache.offsets)[documents]
        self.total_tokens = int(self._lengths.sum())
        self.rows_per_epoch = self.total_tokens // sequence_length
        if self.rows_per_epoch == 0:
            raise CorpusError(
                f"the corpus has {self.total_tokens} tokens in {len(documents)} documents, less than one window of "
                f"{sequence_length}; add text or lower data.sequence_length"
            )
        self._epoch: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def bytes_per_token(self) -> float:
        """Text bytes for each predicted token: divides a loss per token into one per byte."""
        return float(self.cache.text_bytes[self.documents].sum()) / self.total_tokens

    def batch(self, first_row: int, rows: int) -> TextBatch:
        """Rows ``first_row`` to ``first_row + rows - 1`` of the endless sequence."""
        length = self.sequence_length
        tokens = np.empty((rows, length), dtype=np.int64)
        targets = np.empty((rows, length), dtype=np.int64)
        lengths = [self._fill(first_row + row, tokens[row], targets[row]) for row in range(rows)]
        return TextBatch(torch.from_numpy(tokens), torch.from_numpy(targets), lengths)

    def document_capacity(self, rows: int) -> int:
        """The most documents that any batch of ``rows`` rows can touch, in whatever order they come.

        Whole documents fit best when they are the shortest ones; each row can cut one more at
        either end. A layout of this capacity has the same shape for every batch.
        """
        shortest = np.cumsum(np.sort(self._lengths))
        fitting = int(np.searchsorted(shortest, rows * self.sequence_length, side="right"))
        return min(fitting + 2 * rows, rows * self.sequence_length)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document order, position at which each begins in the epoch's stream, and row order."""
        if self._epoch is None or self._epoch[0] != epoch:
            if self.shuffle:
                documents = permutation(self.seed, epoch, _DOCUMENTS, count=len(self.documents))
                rows = permutation(self.seed, epoch, _ROWS, count=self.rows_per_epoch)
            else:
                documents, rows = np.arange(len(self.documents)), np.arange(self.rows_per_epoch)
            begins = np.concatenate([[0], np.cumsum(self._lengths[documents])])
            self._epoch = (epoch, documents, begins, rows)
        return self._epoch[1:]

    def _fill(self, row: int, tokens: np.ndarray, targets: np.ndarray) -> list[int]:
        order, begins, rows = self._order(row // self.rows_per_epoch)
        position = int(rows[row % self.rows_per_epoch]) * self.sequence_length
        slot = int(np.searchsorted(begins, position, side="right")) - 1
        column, lengths = 0, []
        while column < self.sequence_length:
            inside = position + column - int(begins[slot])
            count = min(int(begins[slot + 1]) - position - column, self.sequence_length - column)
            start = int(self.cache.offsets[self.documents[order[slot]]]) + inside
            tokens[column : column + count] = self.cache.tokens[start : start + count]
            targets[column : column + count] = self.cache.tokens[start + 1 : start + count + 1]
            lengths.append(count)
            column += count
            slot += 1
        return lengths
