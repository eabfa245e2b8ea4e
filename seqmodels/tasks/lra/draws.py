"""Random numbers whose values no library version changes: the raw 64-bit stream of PCG64 and integer arithmetic."""

from __future__ import annotations

import numpy as np

_BLOCK = 4096


class Draws:
    """The PCG64 stream named by ``seed`` and further integers (all >= 0), one draw a number."""

    def __init__(self, seed: int, *stream: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, *stream]))
        self._block: list[int] = []

    def raw(self) -> int:
        """64 bits."""
        if not self._block:
            self._block = self._bits.random_raw(_BLOCK)[::-1].tolist()
        return self._block.pop()

    def below(self, count: int) -> int:
        """Uniform in 0..count - 1, up to a bias of count / 2^64."""
        return self.raw() * count >> 64

    def uniform(self) -> float:
        """Uniform in [0, 1): a multiple of 2^-53."""
        return (self.raw() >> 11) * 2.0**-53

    def weighted(self, weights: np.ndarray) -> int:
        """Index i with probability weights[i] / sum(weights); the sum must be positive."""
        total = np.cumsum(weights)
        return int(min(np.searchsorted(total, self.uniform() * total[-1], side="right"), len(total) - 1))
