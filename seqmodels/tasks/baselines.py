"""What a language model of text has to beat: general compressors and byte n-grams."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable

import numpy as np


def zlib_bits_per_byte(texts: list[bytes]) -> float:
    """Bits a byte of zlib at level 9, all texts as one stream."""
    return _bits_per_byte(len(zlib.compress(b"".join(texts), 9)), texts)


def lzma_bits_per_byte(texts: list[bytes]) -> float:
    """Bits a byte of lzma (raw LZMA2, preset 9 extreme, no container), all texts as one stream."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return _bits_per_byte(len(lzma.compress(b"".join(texts), format=lzma.FORMAT_RAW, filters=filters)), texts)


def _bits_per_byte(compressed: int, texts: list[bytes]) -> float:
    return 8 * compressed / sum(map(len, texts))


class ByteTrigram:
    """An interpolated Kneser-Ney byte trigram.

    p(c | a b) = max(n(abc) - D3, 0) / n(ab) + D3 t(ab) / n(ab) * p(c | b), where t(ab) is the number of
    distinct bytes seen after ab; p(c | b) and p(c) are the same with continuation counts (distinct
    bytes seen before) in place of n, and the last one backs off to 1/256. Discounts are
    D = n1 / (n1 + 2 n2), with n1 and n2 the numbers of n-grams seen once and twice.

    Each text is read between NUL bytes, two before and one after, and is charged for its end, as the
    language models here are.
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        counts = np.zeros(1 << 24, dtype=np.int64)
        for text in texts:
            codes, occurrences = np.unique(_codes(text), return_counts=True)
            counts[codes] += occurrences
        trigrams = counts.reshape(256, 256, 256)
        bigrams = (trigrams > 0).sum(0)  # (b, c): distinct a before
        unigrams = (bigrams > 0).sum(0)  # (c,): distinct b before
        uniform = np.full(256, 1 / 256)
        self._unigram = _interpolate(unigrams, uniform)
        self._bigram = _interpolate(bigrams, self._unigram)
        self._trigram = _interpolate(trigrams, self._bigram)

    def bits_per_byte(self, texts: list[bytes]) -> float:
        """Code length of ``texts``, ends included, over their bytes."""
        flat = self._trigram.reshape(-1)
        bits = -sum(float(np.log2(flat[_codes(text)]).sum()) for text in texts)
        return bits / sum(map(len, texts))

    def probabilities(self, first: int, second: int) -> np.ndarray:
        """(256,) p(c | first second)."""
        return self._trigram[first, second]


def _codes(text: bytes) -> np.ndarray:
    """a * 65536 + b * 256 + c for every position, the end included."""
    padded = np.concatenate([np.zeros(2, np.uint8), np.frombuffer(text, np.uint8), np.zeros(1, np.uint8)]).astype(
        np.int64
    )
    return (padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]


def _interpolate(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Absolute discounting of ``counts`` (..., 256), the freed mass spread as ``lower``."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    total = counts.sum(-1, keepdims=True)
    distinct = (counts > 0).sum(-1, keepdims=True)
    seen = np.maximum(counts - discount, 0) / np.maximum(total, 1)
    spread = np.where(total > 0, discount * distinct / np.maximum(total, 1), 1.0)
    return (seen + spread * lower).astype(np.float32 if counts.ndim == 3 else np.float64)
