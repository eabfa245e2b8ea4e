"""What every recall generator returns, and the raw draws it is made from.

One seed gives one data set on every platform and library version. Only the raw 64-bit stream of PCG64
is used, one row of draws an example, so that a larger ``count`` begins with the examples of a smaller
one; and only integer arithmetic and IEEE additions, products and quotients on them: a C library's
``log`` or ``pow`` may differ in the last bit from machine to machine.
"""

from __future__ import annotations

import decimal
import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

NO_TARGET = -100  # what cross-entropy ignores
_HALF = np.uint64(32)
_BLOCK = 1 << 20  # draws at a time: a few MB


class Examples(NamedTuple):
    """Rows of equal length.

    Attributes:
        tokens: (count, length) int32.
        targets: (count, length) int32, the answer at the position where a model must give it,
            :data:`NO_TARGET` elsewhere.
    """

    tokens: np.ndarray
    targets: np.ndarray

    @classmethod
    def empty(cls, count: int, length: int, token: int = 0) -> Examples:
        """``count`` rows of ``token`` without targets."""
        return cls(np.full((count, length), token, np.int32), np.full((count, length), NO_TARGET, np.int32))

    def digest(self) -> str:
        """Of all tokens and targets, the same on every platform."""
        content = hashlib.sha256()
        for array in self:
            content.update(repr(array.shape).encode())
            content.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
        return content.hexdigest()[:16]


def blocks(seed: int, stream: tuple[int, ...], count: int, width: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the stream named by ``seed`` and ``stream``: slices of [0, count) and (rows, width) uint64 draws."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, *stream]))
    rows = max(1, _BLOCK // max(1, width))
    for at in range(0, count, rows):
        size = min(rows, count - at)
        yield slice(at, at + size), np.asarray(bits.random_raw(size * width), np.uint64).reshape(size, width)


def below(draws: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """int64 in [0, bound), bound up to 2^32, from the upper halves; uneven by less than bound / 2^32."""
    return (((draws >> _HALF) * np.asarray(bound, np.uint64)) >> _HALF).astype(np.int64)


def uniform(draws: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), multiples of 2^-53."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def distinct(draws: np.ndarray, pool: int) -> np.ndarray:
    """(rows, k) distinct integers of [0, pool), each ordered choice equally likely: k swaps of a shuffle.

    ``draws`` is (rows, k). ``ValueError`` when k exceeds ``pool``.
    """
    count, k = draws.shape
    if k > pool:
        raise ValueError(f"{k} distinct values of a pool of {pool}; expected at most {pool}")
    chosen = np.empty((count, k), np.int64)
    dtype = np.int16 if pool < 1 << 15 else np.int32
    rows = max(1, (1 << 22) // pool)
    for at in range(0, count, rows):
        part = draws[at : at + rows]
        table = np.tile(np.arange(pool, dtype=dtype), (len(part), 1)).reshape(-1)
        base = np.arange(len(part)) * pool
        for j in range(k):
            pick = base + j + below(part[:, j], pool - j)
            chosen[at : at + rows, j] = table[pick]
            table[pick] = table[base + j]
    return chosen


def weighted_distinct(draws: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """(rows, k) distinct indices, drawn one after another with probability proportional to what is left of ``weights``.

    Item i arrives at an exponential time of rate weights[i]; the first k to arrive, in their order,
    have that law. ``draws`` is (rows, items).
    """
    if k > len(weights):
        raise ValueError(f"{k} distinct values of a pool of {len(weights)}; expected at most {len(weights)}")
    arrival = -_log(1.0 - uniform(draws)) / weights
    return np.argsort(arrival, axis=1, kind="stable")[:, :k]


@functools.cache
def power_weights(count: int, exponent: float) -> np.ndarray:
    """i^exponent for i = 1..count, correctly rounded (``pow`` of a C library need not be)."""
    context = decimal.Context(prec=40)
    power = decimal.Decimal(repr(float(exponent)))
    weights = np.array([float(context.power(decimal.Decimal(i), power)) for i in range(1, count + 1)])
    weights.setflags(write=False)  # it is shared by all callers
    return weights


def first_occurrence(codes: np.ndarray) -> np.ndarray:
    """(rows, n) integers to the column at which each one stands first in its row."""
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, 1)
    new = np.ones_like(codes, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = np.maximum.accumulate(np.where(new, np.arange(codes.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, run, 1), 1)
    return first


def check_count(owner: str, count: int) -> None:
    """Refuses an empty data set."""
    if count < 1:
        raise ValueError(f"{owner}: count is {count}; expected at least one example")


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive doubles: 2 artanh((m - 1) / (m + 1)) + e log 2, to about 1e-16 of its value.

    Additions, products and quotients alone, whose rounding IEEE 754 fixes.
    """
    mantissa, exponent = np.frexp(x)  # in [1/2, 1)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2, mantissa)
    exponent = exponent - low
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s  # at most 0.0295: the 12th term is below 1e-18
    series = np.full_like(square, 1 / 23)
    for denominator in range(21, 0, -2):
        series = series * square + 1 / denominator
    return exponent * 0.6931471805599453 + 2 * s * series
