"""Examples of a classification task in memory: ragged rows of small integers, and labels."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqmodels.layout import Layout


class Pixels(NamedTuple):
    """x = (value / 255 - mean) / std: what a model reads in place of an 8-bit value."""

    mean: float = 0.0
    std: float = 1.0


class Batch(NamedTuple):
    """``inputs`` as :class:`~seqmodels.models.SequenceClassifier` takes them, padded with 0 on the right;
    ``layout`` is None where no row is padded."""

    inputs: Tensor
    labels: Tensor
    layout: Layout | None

    def to(self, device: torch.device) -> Batch:
        layout = None if self.layout is None else self.layout.to(device)
        return Batch(self.inputs.to(device), self.labels.to(device), layout)


class Examples(NamedTuple):
    """Attributes:
    values: (total,) uint8 or uint16, all rows one after another: token ids, or 8-bit pixels.
    offsets: (rows + 1,) int64, where each row begins.
    labels: (examples,) int64; an example has ``sequences`` rows in turn.
    sequences: rows of one example: 1, or 2 for pairs.
    """

    values: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    sequences: int = 1

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64."""
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def select(self, begin: int, end: int) -> Examples:
        """Examples ``begin`` to ``end - 1``."""
        offsets = self.offsets[begin * self.sequences : end * self.sequences + 1]
        values = self.values[offsets[0] : offsets[-1]]
        return Examples(values, offsets - offsets[0], self.labels[begin:end], self.sequences)

    def take(self, indices: np.ndarray) -> Examples:
        """A copy of the examples ``indices``, in that order."""
        rows = [self.row(row) for index in indices for row in self._rows(int(index))]
        return gather(rows, self.labels[indices], self.sequences)

    def batch(self, indices: np.ndarray, pixels: Pixels | None = None) -> Batch:
        """The examples ``indices``; with ``pixels`` real inputs of width 1, otherwise ids."""
        rows = [self.row(row) for index in indices for row in self._rows(int(index))]
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        grid = np.zeros((len(rows), longest), dtype=np.int64)
        for line, row in zip(grid, rows, strict=True):
            line[: len(row)] = row
        inputs = torch.from_numpy(grid)
        if pixels is not None:
            real = (inputs.float() / 255 - pixels.mean) / pixels.std
            inputs = real.unsqueeze(-1)
        if self.sequences > 1:
            inputs = inputs.unflatten(0, (-1, self.sequences))
        padded = min(lengths) < longest
        layout = Layout.packed([[length] for length in lengths], longest) if padded else None
        return Batch(inputs, torch.from_numpy(self.labels[indices].astype(np.int64)), layout)

    def _rows(self, index: int) -> range:
        return range(index * self.sequences, (index + 1) * self.sequences)


def row_key(row: np.ndarray) -> bytes:
    """16 bytes that tell rows apart: a hash of their content."""
    return hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()


def gather(rows: list[np.ndarray], labels: np.ndarray, sequences: int = 1) -> Examples:
    """Examples from their rows, one after another."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    values = np.concatenate(rows) if rows else np.zeros(0, np.uint8)
    return Examples(values, offsets, np.asarray(labels, dtype=np.int64), sequences)


def join(parts: list[Examples]) -> Examples:
    """All examples of ``parts`` in turn."""
    offsets, at = [np.zeros(1, np.int64)], 0
    for part in parts:
        offsets.append(part.offsets[1:] + at)
        at += int(part.offsets[-1])
    return Examples(
        np.concatenate([part.values for part in parts]),
        np.concatenate(offsets),
        np.concatenate([part.labels for part in parts]),
        parts[0].sequences,
    )
