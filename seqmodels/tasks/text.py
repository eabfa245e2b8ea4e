"""Language-model batches from a token cache: packed rows with document boundaries.

An epoch is the documents in shuffled order, one after another, cut into rows of
``sequence_length`` tokens; the rows are then shuffled too. Each row therefore is full (no
padding, every target counts), and a document's tokens see only that document. A batch is a pure
function of the configuration and of one integer, the number of rows consumed, which is all that
a checkpoint stores to go on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    ``masked``: (rows, prefix) bool where a prefix objective masks tokens; ``inside``: of each row, whether it
    begins inside a document."""

    tokens: Tensor
    targets: Tensor
    lengths: list[list[int]]
    masked: Tensor | None = None
    inside: tuple[bool, ...] = ()

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


class DocumentStream:
    """Documents one after another, epoch after epoch without end; each epoch has an order of its own."""

    _EPOCHS = 64  # orders kept: readers may be in different epochs at a time

    def __init__(self, cache: TokenCache, documents: np.ndarray, *, seed: int, shuffle: bool = True) -> None:
        self.cache = cache
        self.documents = documents
        self.seed = seed
        self.shuffle = shuffle
        self.lengths = np.diff(cache.offsets)[documents]
        self.total_tokens = int(self.lengths.sum())
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, positions: Sequence[int], count: int) -> TextBatch:
        """``count`` tokens from each of ``positions``, counted from the stream's first token; a row each."""
        tokens = np.empty((len(positions), count), dtype=np.int64)
        targets = np.empty_like(tokens)
        rows = [self._fill(start, tokens[row], targets[row]) for row, start in enumerate(positions)]
        inside = tuple(begun for _, begun in rows)
        return TextBatch(torch.from_numpy(tokens), torch.from_numpy(targets), [row for row, _ in rows], None, inside)

    def document_capacity(self, rows: int, count: int) -> int:
        """The most documents that ``rows`` stretches of ``count`` tokens can touch, wherever they begin.

        Each can cut a document at either end, and hold the shortest ones once for every epoch it touches.
        """
        epochs = count // self.total_tokens + 2
        shortest = np.cumsum(np.sort(self.lengths))
        whole = int(np.searchsorted(shortest, count / epochs, side="right")) + 1
        return rows * min(epochs * whole + 2, count)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's documents in order, and the position in the epoch at which each begins (its end last)."""
        if epoch not in self._orders:
            while len(self._orders) >= self._EPOCHS:
                del self._orders[next(iter(self._orders))]
            count = len(self.documents)
            order = permutation(self.seed, epoch, _DOCUMENTS, count=count) if self.shuffle else np.arange(count)
            self._orders[epoch] = (order, np.concatenate([[0], np.cumsum(self.lengths[order])]))
        return self._orders[epoch]

    def _fill(self, start: int, tokens: np.ndarray, targets: np.ndarray) -> tuple[list[int], bool]:
        """The lengths of the documents in the stretch, and whether the first of them began before it."""
        epoch, position = divmod(start, self.total_tokens)
        order, begins = self._order(epoch)
        slot = int(np.searchsorted(begins, position, side="right")) - 1
        inside = position > int(begins[slot])
        column, lengths = 0, []
        while column < len(tokens):
            if slot == len(order):
                epoch, position, slot = epoch + 1, -column, 0
                order, begins = self._order(epoch)
            skipped = position + column - int(begins[slot])
            count = min(int(begins[slot + 1]) - position - column, len(tokens) - column)
            first = int(self.cache.offsets[self.documents[order[slot]]]) + skipped
            tokens[column : column + count] = self.cache.tokens[first : first + count]
            targets[column : column + count] = self.cache.tokens[first + 1 : first + count + 1]
            lengths.append(count)
            column += count
            slot += 1
        return lengths, inside


class PackedText:
    """Rows of packed documents, addressed by number; epoch after epoch without end.

    Attributes:
        stream: the documents in each epoch's order, which the rows are cut from.
    """

    def __init__(
        self, cache: TokenCache, documents: np.ndarray, sequence_length: int, *, seed: int, shuffle: bool = True
    ) -> None:
        self.stream = DocumentStream(cache, documents, seed=seed, shuffle=shuffle)
        self.cache = cache
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.total_tokens = self.stream.total_tokens
        self.rows_per_epoch = self.total_tokens // sequence_length
        if self.rows_per_epoch == 0:
            raise CorpusError(
                f"the corpus has {self.total_tokens} tokens in {len(documents)} documents, less than one window of "
                f"{sequence_length}; add text or lower data.sequence_length"
            )
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def bytes_per_token(self) -> float:
        """Text bytes for each predicted token: divides a loss per token into one per byte."""
        return float(self.cache.text_bytes[self.documents].sum()) / self.total_tokens

    def batch(self, first_row: int, rows: int) -> TextBatch:
        """Rows ``first_row`` to ``first_row + rows - 1`` of the endless sequence."""
        return self.stream.read([self._position(first_row + row) for row in range(rows)], self.sequence_length)

    def document_capacity(self, rows: int) -> int:
        """The most documents that any batch of ``rows`` rows can touch, in whatever order they come.

        Whole documents fit best when they are the shortest ones; each row can cut one more at
        either end. A layout of this capacity has the same shape for every batch.
        """
        shortest = np.cumsum(np.sort(self.stream.lengths))
        fitting = int(np.searchsorted(shortest, rows * self.sequence_length, side="right"))
        return min(fitting + 2 * rows, rows * self.sequence_length)

    def _position(self, row: int) -> int:
        """Where a row begins in the stream."""
        epoch, place = divmod(row, self.rows_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            count = self.rows_per_epoch
            order = permutation(self.seed, epoch, _ROWS, count=count) if self.shuffle else np.arange(count)
            self._epoch = (epoch, order)
        return epoch * self.total_tokens + int(self._epoch[1][place]) * self.sequence_length
