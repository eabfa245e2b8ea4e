"""The byte trigram against its definition, and compressors on texts whose answer is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from seqmodels.tasks.baselines import ByteTrigram, lzma_bits_per_byte, zlib_bits_per_byte
from seqmodels.tasks.shuffle import raw_draws

TEXTS = [b"the state of the state", b"a scan is a sum", b"the sum", b""]


def trigram_by_hand(texts, first, second, third):
    """Interpolated Kneser-Ney in dictionaries, as Chen and Goodman (1999) write it."""
    trigrams = Counter()
    for text in texts:
        padded = [0, 0, *text, 0]
        trigrams.update(zip(padded, padded[1:], padded[2:], strict=False))
    bigrams = Counter((b, c) for _, b, c in trigrams)
    unigrams = Counter(c for _, c in bigrams)

    def level(counts, context, last, lower):
        once, twice = (sum(value == n for value in counts.values()) for n in (1, 2))
        discount = once / (once + 2 * twice)
        following = {key: value for key, value in counts.items() if key[:-1] == context}
        total = sum(following.values())
        if not total:
            return lower
        return (max(counts[(*context, last)] - discount, 0) + discount * len(following) * lower) / total

    one = level(Counter({(c,): n for c, n in unigrams.items()}), (), third, 1 / 256)
    two = level(bigrams, (second,), third, one)
    return level(trigrams, (first, second), third, two)


def test_probabilities_are_kneser_ney():
    model = ByteTrigram(TEXTS)
    contexts = [
        (0, 0),
        (0, ord("t")),
        (ord("t"), ord("h")),
        (ord("s"), ord("t")),
        (ord("z"), ord("e")),
        (ord("x"), ord("y")),
    ]
    for first, second in contexts:
        found = model.probabilities(first, second)
        assert found.sum() == pytest.approx(1, abs=1e-6)
        for third in (0, ord("e"), ord("t"), ord(" "), 200):
            assert found[third] == pytest.approx(trigram_by_hand(TEXTS, first, second, third), rel=1e-5)


def test_code_length_counts_every_byte_and_the_end():
    model = ByteTrigram(TEXTS)
    text = b"the scan"
    padded = [0, 0, *text, 0]
    triples = zip(padded, padded[1:], padded[2:], strict=False)
    bits = -sum(math.log2(trigram_by_hand(TEXTS, *triple)) for triple in triples)
    assert model.bits_per_byte([text, text]) == pytest.approx(bits / len(text), rel=1e-5)


def test_bytes_without_pattern_cost_eight_bits():
    noise = [raw_draws(1, index, count=4000).astype(np.uint64).tobytes() for index in range(4)]
    assert 7.99 < zlib_bits_per_byte(noise) < 8.02
    assert 7.99 < lzma_bits_per_byte(noise) < 8.02
    assert ByteTrigram(noise[:3]).bits_per_byte(noise[3:]) > 7.99


def test_one_stream_finds_what_texts_share():
    text = raw_draws(2, count=500).tobytes()
    assert zlib_bits_per_byte([text, text]) < 0.6 * zlib_bits_per_byte([text])
    assert lzma_bits_per_byte([text, text]) < 0.6 * lzma_bits_per_byte([text])
