"""Sizes for which the fast Fourier transform is fast."""

from __future__ import annotations

import functools


@functools.lru_cache(4096)
def fft_size(minimum: int) -> int:
    """The smallest even 2^a 3^b 5^c >= minimum (2 at least): small factors only, and real input halves evenly."""
    best = 2
    while best < minimum:
        best *= 2
    five = 2
    while five < best:
        three = five
        while three < best:
            size = three
            while size < minimum:
                size *= 2
            best = min(best, size)
            three *= 3
        five *= 5
    return best
