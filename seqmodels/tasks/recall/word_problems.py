"""Word problems over finite groups (Merrill et al., arXiv:2404.08819): the running product of group elements."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from seqmodels.configuration import nearest
from seqmodels.tasks.recall.examples import Examples, below, blocks, check_count
from seqmodels.tasks.recall.registry import Split
from seqmodels.tasks.shuffle import permutation

STREAM = 7  # of the order in which all sequences of a small problem are split
MOST = 1 << 22  # sequences that are enumerated at most
CHUNK = 1 << 12  # sequences drawn at a time where they are not


def _alternating(n: int) -> list[tuple[int, ...]]:
    return [p for p in itertools.permutations(range(n)) if _even(p)]


def _even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


def _permutation_table(elements: list[tuple[int, ...]]) -> np.ndarray:
    """``table[a, b]`` is a b, which does a first: (a b)(i) = b(a(i)). Elements in lexicographic order, identity 0."""
    index = {p: number for number, p in enumerate(elements)}
    return np.array([[index[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _cyclic_table(n: int) -> np.ndarray:
    return np.add.outer(np.arange(n), np.arange(n)) % n


def _product_table(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of the direct product; (a, b) has number a |second| + b."""
    n = len(second)
    a, b = np.divmod(np.arange(len(first) * n), n)
    return first[np.ix_(a, a)] * n + second[np.ix_(b, b)]


_TABLES = {
    "S3": lambda: _permutation_table(list(itertools.permutations(range(3)))),
    "S5": lambda: _permutation_table(list(itertools.permutations(range(5)))),
    "A5": lambda: _permutation_table(_alternating(5)),
    "A4xZ5": lambda: _product_table(_permutation_table(_alternating(4)), _cyclic_table(5)),
    "Z60": lambda: _cyclic_table(60),
}
GROUPS = tuple(_TABLES)


@functools.cache
def multiplication_table(group: str) -> np.ndarray:
    """(order, order) int64: ``table[a, b]`` is the product a b; element 0 is the identity.

    Groups: S3, S5 (symmetric), A5 (alternating), A4xZ5, Z60 (cyclic). S5 and A5 are not solvable.
    """
    if group not in _TABLES:
        raise ValueError(f"unknown group {group!r}.{nearest(group, GROUPS)} Known: {', '.join(GROUPS)}")
    table = _TABLES[group]()
    table.setflags(write=False)
    return table


def word_problem(
    count: int,
    *,
    group: str = "S3",
    length: int = 20,
    train_fraction: float = 0.8,
    split_seed: int = 0,
    seed: int,
    stream: tuple[int, ...] = (),
    split: Split = "train",
) -> Examples:
    """Uniform elements g_1..g_k; the target at position t is g_1 g_2 ... g_t.

    Training and test sequences are different ones, and no sequence appears twice in a set. Where
    order^length is at most 2^22, all sequences are put in an order named by ``split_seed`` and the first
    ``train_fraction`` of it is for training; ``count`` is then cut to what there is. Longer sequences are
    drawn, and each belongs to the part that a hash of its elements says.

    Raises:
        ValueError: an unknown group, no length, a fraction outside (0, 1).
    """
    check_count("word_problem", count)
    table = multiplication_table(group)
    if length < 1:
        raise ValueError(f"word_problem: length is {length}; expected at least 1")
    if not 0 < train_fraction < 1:
        raise ValueError(f"word_problem: train_fraction is {train_fraction}; expected between 0 and 1")
    order = len(table)
    if order**length <= MOST:
        numbers = _enumerated(order, length, count, train_fraction, split_seed, split, seed, stream)
        tokens = numbers[:, None] // order ** np.arange(length)[::-1] % order
    else:
        tokens = _drawn(order, length, count, train_fraction, split_seed, split, seed, stream)
    targets = np.empty_like(tokens)
    product = np.zeros(len(tokens), np.int64)
    for at in range(length):
        targets[:, at] = product = table[product, tokens[:, at]]
    return Examples(tokens.astype(np.int32), targets.astype(np.int32))


def vocab_size(**settings: object) -> int:
    """Elements of the group."""
    return len(multiplication_table(str(settings["group"])))


def _enumerated(
    order: int, length: int, count: int, fraction: float, split_seed: int, split: Split, seed: int,
    stream: tuple[int, ...],
) -> np.ndarray:  # fmt: skip
    """Numbers of sequences, base ``order``."""
    everything = permutation(split_seed, STREAM, count=order**length)
    cut = min(max(1, int(len(everything) * fraction)), len(everything) - 1)
    own = everything[:cut] if split == "train" else everything[cut:]
    return own[permutation(seed, *stream, count=len(own))[:count]]


def _drawn(
    order: int, length: int, count: int, fraction: float, split_seed: int, split: Split, seed: int,
    stream: tuple[int, ...],
) -> np.ndarray:  # fmt: skip
    """(count, length) distinct sequences of one part, in the order in which they were drawn."""
    found: list[np.ndarray] = []
    seen: set[bytes] = set()
    for chunk in itertools.count():
        for _, draws in blocks(seed, (*stream, chunk), CHUNK, length):
            tokens = below(draws, order)
            part = _hash(tokens, split_seed) < np.uint64(int(fraction * 2**32))
            for row in tokens[part == (split == "train")].astype(np.uint8):
                key = row.tobytes()
                if key not in seen:
                    seen.add(key)
                    found.append(row)
                    if len(found) == count:
                        return np.stack(found).astype(np.int64)
    raise AssertionError("unreachable")


def _hash(tokens: np.ndarray, seed: int) -> np.ndarray:
    """(rows,) uint64 below 2^32: a polynomial of the elements, mixed."""
    value = np.full(len(tokens), seed + 1, np.uint64)
    for at in range(tokens.shape[1]):
        value = (value ^ tokens[:, at].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return (value * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)
