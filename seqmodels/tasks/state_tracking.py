"""Formal languages that need a tracked state: parity, and arithmetic modulo 5 without and with brackets.

Sequences and answers are those of the length-generalisation studies (Grazzi et al. 2024, xLSTM,
Mamba-3's appendix D). One seed gives one data set on every platform and library version: only raw
draws of PCG64 are used (:mod:`seqmodels.tasks.shuffle`), one row of draws an example, so that a
larger ``count`` begins with the examples of a smaller one.

A length n counts the answer: it is what a model has to say after the n - 1 or n - 2 tokens it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seqmodels.configuration import nearest
from seqmodels.tasks.shuffle import raw_draws

NO_TARGET = -100  # what cross-entropy ignores
_BITS = np.uint64(32)


class Examples(NamedTuple):
    """Padded on the right.

    Attributes:
        tokens: (count, width) int64.
        targets: (count, width) int64, the answer at the token after which it is due, -100 elsewhere.
        lengths: (count,) int64, tokens of each row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


class Task(NamedTuple):
    """One language.

    Attributes:
        name: as in :data:`TASKS`.
        vocab_size, pad: token ids.
        first_answer, num_answers: answers are the ids first_answer to first_answer + num_answers - 1.
        min_length: the smallest n, answer included.
        unread: n minus the tokens a row of length n has at most.
        draw: (draws, n, width, every_token) to examples.
        has_running_answer: every token of a sequence has an answer of its own, not only the last.
    """

    name: str
    vocab_size: int
    pad: int
    first_answer: int
    num_answers: int
    min_length: int
    unread: int
    draw: Callable[[np.ndarray, np.ndarray, int, bool], Examples]
    has_running_answer: bool = False

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.num_answers


def task_named(name: str) -> Task:
    """The task; ``ValueError`` with the nearest names when there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}.{nearest(name, TASKS)} Known: {', '.join(TASKS)}")
    return TASKS[name]


def generate(
    name: str,
    count: int,
    min_length: int,
    max_length: int,
    *,
    seed: int,
    stream: tuple[int, ...] = (),
    every_token: bool = False,
) -> Examples:
    """``count`` examples whose lengths n are uniform in [min_length, max_length].

    ============================  ===========================================================  ==================
    name                          a row of length n                                            answer
    ============================  ===========================================================  ==================
    parity                        n - 1 bits (ids 1, 2)                                        1 even, 2 odd
    modular_arithmetic            digit (operator digit)* ``=``: n - 2 symbols before ``=``,   5 + value mod 5
                                  n - 3 when that is even; + 1, - 2, x 3, = 4, digits 5 to 9
    modular_arithmetic_brackets   an expression of n - 3 symbols (n at least 5), ``=``;        value mod 5
                                  digits 0 to 4, + 5, - 6, x 7 (never drawn), ( 8, ) 9, = 10
    ============================  ===========================================================  ==================

    Padding is 0, 0 and 11. Multiplication binds stronger; a bracketed expression of 1, 2, 3, 4 and
    more symbols is ``d``, ``-d``, ``(d)``, ``(-d)`` and ``(L op R)`` with op + or - and the length of
    L uniform. All rows are as wide as the longest row ``max_length`` allows.

    Args:
        seed, stream: name the data set; different streams of a seed are independent.
        every_token: parity only: the parity of the bits so far is the target of every token.

    Raises:
        ValueError: an unknown task, no examples, a length too short for the task, an empty range,
            ``every_token`` for a task whose answer exists at the end only.
    """
    task = task_named(name)
    if count < 1:
        raise ValueError(f"{name}: count is {count}; expected at least one example")
    if min_length < task.min_length:
        raise ValueError(f"{name}: min_length is {min_length}; expected at least {task.min_length}, answer included")
    if max_length < min_length:
        raise ValueError(f"{name}: max_length is {max_length}; expected at least min_length={min_length}")
    if task.name == BRACKETS and max_length < MIN_BRACKETS:
        raise ValueError(f"{name}: max_length is {max_length}; expected at least {MIN_BRACKETS}, the shortest there is")
    if every_token and not task.has_running_answer:
        raise ValueError(f"{name}: every_token needs an answer after every token; this task has one at the end only")
    draws = raw_draws(seed, *stream, count=count * (1 + max_length)).reshape(count, 1 + max_length)
    n = min_length + _below(draws[:, 0], np.uint64(max_length - min_length + 1))
    return task.draw(draws[:, 1:], n, max_length - task.unread, every_token)


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 for guessing, 1 for no error."""
    if not 0 <= accuracy <= 1 or not 0 <= chance < 1:
        raise ValueError(f"accuracy is {accuracy} and chance {chance}; expected 0 to 1, chance below 1")
    return (accuracy - chance) / (1 - chance)


def accuracy_by_length(name: str, predictions: np.ndarray, examples: Examples) -> dict[int, tuple[int, int]]:
    """Length n to (right answers, answers), over every token that has a target.

    Args:
        predictions: (count, width) ids; those without a target do not count.

    An answer due after t tokens has length n = t + 1 for parity, t + 1 and t + 2 for arithmetic
    without and with brackets.
    """
    if predictions.shape != examples.targets.shape:
        raise ValueError(f"predictions are {predictions.shape}; expected the targets' shape {examples.targets.shape}")
    scored = examples.targets != NO_TARGET
    right = (scored & (predictions == examples.targets)).sum(0)
    asked = scored.sum(0)
    unread = task_named(name).unread
    return {int(t) + 1 + unread: (int(right[t]), int(asked[t])) for t in np.flatnonzero(asked)}


def _below(draws: np.ndarray, bound: np.ndarray | np.uint64) -> np.ndarray:
    """Integers in [0, bound) from the upper halves of 64-bit draws; uneven by less than bound / 2^32."""
    return (((draws >> _BITS) * bound) >> _BITS).astype(np.int64)


def _answers(tokens: np.ndarray, lengths: np.ndarray, answers: np.ndarray) -> Examples:
    """One target a row, at its last token."""
    targets = np.full_like(tokens, NO_TARGET)
    targets[np.arange(len(tokens)), lengths - 1] = answers
    return Examples(tokens, targets, lengths)


def _parity(draws: np.ndarray, n: np.ndarray, width: int, every_token: bool) -> Examples:
    lengths = n - 1
    inside = np.arange(width) < lengths[:, None]
    bits = _below(draws[:, :width], np.uint64(2))
    tokens = np.where(inside, 1 + bits, 0)
    parity = 1 + np.cumsum(bits, axis=1) % 2
    if every_token:
        return Examples(tokens, np.where(inside, parity, NO_TARGET), lengths)
    return _answers(tokens, lengths, parity[np.arange(len(tokens)), lengths - 1])


def _arithmetic(draws: np.ndarray, n: np.ndarray, width: int, every_token: bool) -> Examples:
    plus, minus, times, equals, zero = 1, 2, 3, 4, 5
    symbols = (n - 3) // 2 * 2 + 1  # of the expression: odd
    column = np.arange(width)
    digits = _below(draws[:, :width], np.uint64(5))
    operators = plus + _below(draws[:, :width], np.uint64(3))
    tokens = np.where(column % 2 == 0, zero + digits, operators)
    tokens[column > symbols[:, None]] = 0
    tokens[column == symbols[:, None]] = equals
    total, term = np.zeros_like(n), digits[:, 0]
    for at in range(1, width - 1, 2):
        live, operator, digit = at < symbols, tokens[:, at], digits[:, at + 1]
        product = live & (operator == times)
        added = live & ~product
        total = np.where(added, (total + term) % 5, total)
        term = np.where(product, term * digit % 5, np.where(added, np.where(operator == minus, -digit, digit), term))
    return _answers(tokens, symbols + 1, zero + (total + term) % 5)


def _arithmetic_brackets(draws: np.ndarray, n: np.ndarray, width: int, every_token: bool) -> Examples:
    plus, minus, opening, closing, equals, pad = 5, 6, 8, 9, 10, 11
    symbols = np.maximum(n, MIN_BRACKETS) - 3
    tokens = np.full((len(n), width), pad, dtype=np.int64)
    value = np.zeros_like(n)
    tokens[np.arange(len(n)), symbols] = equals
    # All expressions of one depth at a time. With + and - alone, a digit enters the value with the
    # sign that the operators above it make, so nothing has to be evaluated on the way back.
    row, start, length, sign = np.arange(len(n)), np.zeros_like(n), symbols, np.ones_like(n)
    while len(row):
        drawn = draws[row, start]
        leaf = length < 5
        r, s, size = row[leaf], start[leaf], length[leaf]
        bracketed, negative = size >= 3, size % 2 == 0
        at = s + bracketed + negative
        digit = _below(drawn[leaf], np.uint64(5))
        tokens[r[bracketed], s[bracketed]] = opening
        tokens[r[bracketed], (s + size - 1)[bracketed]] = closing
        tokens[r[negative], at[negative] - 1] = minus
        tokens[r, at] = digit
        np.add.at(value, r, np.where(negative, -sign[leaf], sign[leaf]) * digit)
        r, s, size, parent, drawn = row[~leaf], start[~leaf], length[~leaf], sign[~leaf], drawn[~leaf]
        left = 1 + _below(drawn, (size - 4).astype(np.uint64))
        subtract = (drawn & np.uint64(1)).astype(bool)
        tokens[r, s] = opening
        tokens[r, s + 1 + left] = np.where(subtract, minus, plus)
        tokens[r, s + size - 1] = closing
        row = np.concatenate((r, r))
        start = np.concatenate((s + 1, s + 2 + left))
        length = np.concatenate((left, size - 3 - left))
        sign = np.concatenate((parent, np.where(subtract, -parent, parent)))
    return _answers(tokens, symbols + 1, value % 5)


BRACKETS = "modular_arithmetic_brackets"
MIN_BRACKETS = 5  # shorter lengths count as this one
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("parity", 3, 0, 1, 2, min_length=2, unread=1, draw=_parity, has_running_answer=True),
        Task("modular_arithmetic", 10, 0, 5, 5, min_length=3, unread=1, draw=_arithmetic),
        Task(BRACKETS, 12, 11, 0, 5, min_length=1, unread=2, draw=_arithmetic_brackets),
    )
}
