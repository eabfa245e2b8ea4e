"""The pattern shorthand: ``"3x(gated_conv swiglu) attention swiglu"``.

    pattern := item*
    item    := [count "x"] (block | "(" pattern ")")
    block   := path ("|" path)*
    path    := word (">" word)*

A block is one residual sum. ``a>b`` applies ``b`` to the output of ``a``; S4's block is ``s4d>glu``.
``a|b`` gives both the block's normalised input and adds what they return. Repeats nest.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\s*(?:(?P<count>\d+)x|(?P<word>[A-Za-z_]\w*)|(?P<sign>[()>|]))")
Words = tuple[tuple[str, ...], ...]  # a block's paths, each the words of its layers in turn
MAX_BLOCKS = 100_000  # a typing error such as 3000000x should not fill the memory


def parse_pattern(pattern: str) -> list[Words]:
    """The blocks of ``pattern`` in order, each a tuple of paths, each a tuple of one or more words.

    Raises:
        ValueError: with the column, for an empty pattern, unbalanced parentheses, or a repeat of
            zero or of nothing.
    """
    blocks, end = _sequence(pattern, 0, depth=0)
    if pattern[end:].strip():
        raise _error(pattern, end, "this ')' closes nothing")
    if not blocks:
        raise ValueError(f"pattern {pattern!r} names no layer; for example '3x(gated_conv swiglu) attention swiglu'")
    return blocks


def _sequence(pattern: str, at: int, depth: int) -> tuple[list[Words], int]:
    blocks: list[Words] = []
    while True:
        match = _next(pattern, at)
        if match is None or match["sign"] == ")":
            return blocks, at
        count = 1
        if match["count"] is not None:
            count, start = int(match["count"]), match.start("count")
            if count < 1:
                raise _error(pattern, start, "a repeat must be at least 1")
            at = match.end()
            match = _next(pattern, at)
            if match is None or match["count"] is not None or match["sign"] in (")", ">", "|"):
                raise _error(pattern, at, f"'{count}x' must be followed by a word or '('")
        if match["sign"] in (">", "|"):
            raise _error(pattern, match.start("sign"), f"{match['sign']!r} needs a word before it")
        if match["sign"] == "(":
            opened = match.start("sign")
            items, at = _sequence(pattern, match.end(), depth + 1)
            match = _next(pattern, at)
            if match is None:
                raise _error(pattern, opened, "this '(' is never closed")
            if not items:
                raise _error(pattern, opened, "nothing between the parentheses")
            at = match.end()
        else:
            paths: list[tuple[str, ...]] = [(match["word"],)]
            at = match.end()
            while (match := _next(pattern, at)) is not None and match["sign"] in (">", "|"):
                after = _next(pattern, match.end())
                if after is None or after["word"] is None:
                    raise _error(pattern, match.start("sign"), f"{match['sign']!r} needs a word after it")
                if match["sign"] == ">":
                    paths[-1] = (*paths[-1], after["word"])
                else:
                    paths.append((after["word"],))
                at = after.end()
            items = [tuple(paths)]
        if len(blocks) + count * len(items) > MAX_BLOCKS:
            raise _error(pattern, at, f"more than {MAX_BLOCKS} blocks")
        blocks += items * count


def _next(pattern: str, at: int) -> re.Match[str] | None:
    if not pattern[at:].strip():
        return None
    match = _TOKEN.match(pattern, at)
    if match is None:
        while pattern[at].isspace():
            at += 1
        raise _error(pattern, at, f"unexpected {pattern[at]!r}; expected a layer's name, '3x', '(', ')', '>' or '|'")
    return match


def _error(pattern: str, at: int, problem: str) -> ValueError:
    return ValueError(f"pattern {pattern!r}, column {at + 1}: {problem}")
