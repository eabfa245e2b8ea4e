"""ListOps (Nangia and Bowman, arXiv 1804.06028) as Long Range Arena generates it.

A tree of depth at most 10: below the limit a node is an operator with probability 1/4, otherwise, and
always at depth 10, a digit. An operator has 2 to 10 children and is the minimum, the maximum, the
median (the mean of the two middle values of an even number, rounded down) or the sum modulo 10.
Trees of 500 < length < 2000 are kept, no tree twice. A digit has length 1, an operator node
2 plus its children's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from seqmodels.tasks.lra.draws import Draws
from seqmodels.tasks.lra.examples import Examples, gather, row_key

MAX_DEPTH = 10
CHILDREN = (2, 10)
PAD, UNKNOWN, END = 0, 1, 2
OPERATORS = ("[MAX", "[MED", "[MIN", "[SM")
SYMBOLS = (*"0123456789", *OPERATORS, "X")  # ids 3 to 17; the release writes the last one "]"
VOCAB_SIZE = 3 + len(SYMBOLS)
TRUNCATED = 2047  # tokens kept before the end mark
_IDS = {symbol: 3 + index for index, symbol in enumerate(SYMBOLS)}
_DIGIT, _OPERATOR, _CLOSE = _IDS["0"], _IDS[OPERATORS[0]], _IDS["X"]


class Lengths(NamedTuple):
    """Trees with ``above < length < below`` are kept."""

    above: int = 500
    below: int = 2000


class _TooLong(Exception):
    pass


def generate(count: int, lengths: Lengths, draws: Draws, refused: Collection[bytes] = ()) -> Examples:
    """``count`` different trees: their ids with the end mark, and their values.

    Args:
        refused: :func:`~seqmodels.tasks.lra.examples.row_key` of rows that must not be among them.
    """
    seen: set[bytes] = set()
    rows, labels = [], []
    for tokens, value in _trees(lengths, draws):
        row = encode(tokens)
        key = row_key(row)
        if key not in seen and key not in refused:
            seen.add(key)
            rows.append(row)
            labels.append(value)
        if len(rows) == count:
            return gather(rows, np.array(labels))
    raise AssertionError("the stream of trees has no end")


def _trees(lengths: Lengths, draws: Draws) -> Iterator[tuple[list[int], int]]:
    while True:
        tokens: list[int] = []
        try:
            value = _node(draws, 1, tokens, lengths.below)
        except _TooLong:  # it would be refused whole: not drawing the rest changes no probability
            continue
        if len(tokens) > lengths.above:
            yield tokens, value


def _node(draws: Draws, depth: int, tokens: list[int], below: int) -> int:
    """Appends a node's ids and returns its value."""
    if len(tokens) >= below:
        raise _TooLong
    draw = draws.raw()
    if depth == MAX_DEPTH or draw >> 62:  # two bits: zero with probability 1/4
        digit = draws.below(10)
        tokens.append(_DIGIT + digit)
        return digit
    children = CHILDREN[0] + draws.below(CHILDREN[1] - CHILDREN[0] + 1)
    operator = draws.below(len(OPERATORS))
    tokens.append(_OPERATOR + operator)
    values = [_node(draws, depth + 1, tokens, below) for _ in range(children)]
    tokens.append(_CLOSE)
    if len(tokens) >= below:
        raise _TooLong
    return _value(operator, values)


def _value(operator: int, values: list[int]) -> int:
    if operator == 0:
        return max(values)
    if operator == 2:
        return min(values)
    if operator == 3:
        return sum(values) % 10
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2


def encode(tokens: list[int] | np.ndarray) -> np.ndarray:
    """At most 2047 ids and the end mark."""
    return np.array([*tokens[:TRUNCATED], END], dtype=np.uint8)


def tokenize(source: str) -> list[int]:
    """Ids of a tree in the release's notation ``( ( ( [MAX 2 ) 9 ) ] )``; unknown symbols are 1."""
    words = source.replace("(", " ").replace(")", " ").replace("]", " X ").split()
    return [_IDS.get(word, UNKNOWN) for word in words]


def source_text(tokens: list[int] | np.ndarray) -> str:
    """The release's notation of a tree's ids (end mark allowed): every node but a digit as left-nested pairs."""
    stack: list[str] = []
    for token in tokens:
        symbol = "" if token == END else SYMBOLS[token - 3]
        if symbol in OPERATORS:
            stack.append(symbol)
        elif symbol == "X":
            done = f"( {stack.pop()} ] )"
            stack.append(_under(stack, done))
        elif symbol:
            stack.append(_under(stack, symbol))
    (text,) = stack
    return text


def _under(stack: list[str], child: str) -> str:
    """``child`` paired with the open node it belongs to, which is taken from ``stack``; alone without one."""
    return f"( {stack.pop()} {child} )" if stack else child
