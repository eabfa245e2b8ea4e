"""Permutations that stay the same over library versions.

``numpy.random.PCG64`` and its ``SeedSequence`` promise their raw 64-bit stream for ever;
``Generator.permutation`` and ``torch.randperm`` promise nothing. A permutation here is the
stable order of one raw draw per item.
"""

from __future__ import annotations

import hashlib

import numpy as np


def raw_draws(seed: int, *stream: int, count: int) -> np.ndarray:
    """(count,) uint64 draws of the PCG64 stream named by ``seed`` and further integers (all >= 0)."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, *stream]))
    return np.asarray(bits.random_raw(count), dtype=np.uint64)


def permutation(seed: int, *stream: int, count: int) -> np.ndarray:
    """(count,) int64: the order of ``count`` raw draws, ties (of probability 2^-64) by index."""
    return np.argsort(raw_draws(seed, *stream, count=count), kind="stable")


def hashed_order(names: list[str], seed: int) -> np.ndarray:
    """(names,) int64: indices sorted by the BLAKE2b hash of (seed, name).

    A name keeps its place relative to every other one when names are added or removed.
    """
    key = seed.to_bytes(8, "little")
    digests = [
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=key, digest_size=16).digest() for name in names
    ]
    return np.array(sorted(range(len(names)), key=lambda index: (digests[index], index)), dtype=np.int64)
