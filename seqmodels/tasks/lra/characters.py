"""Text as characters: a vocabulary from the training texts, and rows of ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

PAD, UNKNOWN, END = 0, 1, 2


class Characters:
    """Ids 3 and up for the characters of ``texts`` that occur ``min_count`` times or more, by code point."""

    def __init__(self, texts: Iterable[str], min_count: int = 1) -> None:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        self.characters = sorted(character for character, count in counts.items() if count >= min_count)
        points = [ord(character) for character in self.characters]
        self._ids = np.full(max(points, default=0) + 2, UNKNOWN, dtype=np.uint16)
        self._ids[points] = np.arange(len(points)) + 3

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 3

    def encode(self, text: str, kept: int) -> np.ndarray:
        """Ids of the first ``kept`` characters, and the end mark."""
        points = np.frombuffer(text[:kept].encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        row = np.append(ids, np.uint16(END))
        return row.astype(np.uint8) if self.vocab_size <= 256 else row
