"""How often pairs of adjacent tokens occur in a corpus, counted in one pass within fixed memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CAPACITY = 1 << 24  # pairs
CHUNK = 1 << 20  # pairs that wait to be merged into the table


def pair_keys(tokens: np.ndarray) -> np.ndarray:
    """(length - 1,) uint64, one number a pair: ``x[i - 1] * 2**32 + x[i]`` for i >= 1."""
    tokens = np.asarray(tokens).astype(np.uint64)
    return (tokens[:-1] << np.uint64(32)) | tokens[1:]


class BigramCounter:
    """Counts of token pairs (Misra and Gries 1982, in batches).

    While at most ``capacity`` different pairs occur, counts are exact. Beyond, each merge subtracts the count of the
    first pair that does not fit from all and drops what reaches zero. With E = :attr:`error`, the sum of what was
    subtracted::

        count <= true count <= count + E,      E <= pairs / (capacity + 1)

    and a pair that is not in the table occurred at most E times. A test ``count <= threshold`` is therefore wrong only
    for pairs whose true count lies in (threshold, threshold + E], which it takes for rare.

    Memory: 16 bytes for each of ``capacity + chunk`` pairs, at most four times that while they are merged.

    Args:
        capacity: different pairs kept.
        chunk: pairs that wait to be merged.
        origin: what was counted, kept with the table (:meth:`check_origin`).
    """

    def __init__(
        self, capacity: int = CAPACITY, *, chunk: int = CHUNK, origin: Mapping[str, str] | None = None
    ) -> None:
        if capacity < 1 or chunk < 1:
            raise ValueError(f"capacity is {capacity} and chunk {chunk}; expected at least 1 pair each")
        self.capacity, self.chunk = capacity, chunk
        self.origin = dict(origin or {})
        self.pairs = 0
        self._error = 0
        self._keys, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []
        self._size = 0

    @property
    def error(self) -> int:
        """The most by which any count is too small; 0: all are exact."""
        self._merge()
        return self._error

    def add(self, tokens: np.ndarray) -> None:
        """Counts the pairs inside one document; pairs over its ends are none."""
        keys = pair_keys(tokens)
        self.pairs += len(keys)
        for begin in range(0, len(keys), self.chunk):
            part = keys[begin : begin + self.chunk]
            self._waiting.append(part)
            self._size += len(part)
            if self._size >= self.chunk:
                self._merge()

    def counts(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64 counts of ``keys`` (from :func:`pair_keys`), 0 for unknown ones."""
        self._merge()
        if not len(self._keys):
            return np.zeros(len(keys), np.int64)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._counts[place], 0)

    def save(self, path: Path) -> None:
        """Writes the table, whole or not at all; :meth:`load` reads it back."""
        self._merge()
        header = np.array([self.capacity, self.pairs, self._error], np.int64)
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("wb") as file:
            np.savez(
                file, keys=self._keys, counts=self._counts, header=header, origin=np.array(json.dumps(self.origin))
            )
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> BigramCounter:
        """A table of :meth:`save`; ValueError for any other file."""
        try:
            with zipfile.ZipFile(path):  # numpy takes what is no archive for pickled objects
                pass
            with np.load(path, allow_pickle=False) as file:
                keys, counts, header = (file[name] for name in ("keys", "counts", "header"))
                origin = json.loads(str(file["origin"]))
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is no table of bigram counts, or a damaged one ({error}); give a file that --table wrote, or "
                "delete it and count again"
            ) from error
        found = cls(int(header[0]), origin=origin)
        found._keys, found._counts = keys, counts
        found.pairs, found._error = int(header[1]), int(header[2])
        return found

    def check_origin(self, expected: Mapping[str, str]) -> None:
        """ValueError where the table was counted from something else than ``expected`` says."""
        for name, value in expected.items():
            if self.origin.get(name) != value:
                raise ValueError(
                    f"the counts are of another {name}: {self.origin.get(name)!r}, not {value!r}; count again, into "
                    "another table"
                )

    def _merge(self) -> None:
        if not self._waiting:
            return
        new, seen = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting, self._size = [], 0
        keys, counts = np.concatenate([self._keys, new]), np.concatenate([self._counts, seen])
        keys, place = np.unique(keys, return_inverse=True)
        counts = np.bincount(place, counts, len(keys)).astype(np.int64)  # float64 sums: exact below 2**53
        if len(keys) > self.capacity:
            first_out = len(counts) - self.capacity - 1
            cut = int(np.partition(counts, first_out)[first_out])
            self._error += cut
            keep = counts > cut
            keys, counts = keys[keep], counts[keep] - cut
        self._keys, self._counts = keys, counts
