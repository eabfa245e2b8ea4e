"""Induction: what followed this token the last time? (Mamba, arXiv:2312.00752; KV shifting, arXiv:2411.19574)"""

from __future__ import annotations

import numpy as np

from seqmodels.tasks.recall.examples import Examples, below, blocks, check_count, distinct


def induction_heads(
    count: int, *, length: int = 256, vocab_size: int = 16, seed: int, stream: tuple[int, ...] = ()
) -> Examples:
    """One trigger in random tokens, and the trigger again at the end, where the target is what followed it.

    .. code-block:: text

        tokens = r r r T a r r r ... r T     target a at the last position

    T is id vocab_size - 1 and stands nowhere else; all other tokens, a among them, are uniform over the
    rest. The first T is uniform over positions 0 to length - 3.

    Raises:
        ValueError: length below 3, a vocabulary below 3.
    """
    check_count("induction_heads", count)
    if length < 3:
        raise ValueError(f"induction_heads: length {length} is too short for trigger, answer, trigger; at least 3")
    if vocab_size < 3:
        raise ValueError(
            f"induction_heads: vocab_size {vocab_size} is too small for a trigger and 2 others; at least 3"
        )
    examples = Examples.empty(count, length)
    trigger = vocab_size - 1
    for rows, draws in blocks(seed, stream, count, length + 1):
        tokens = examples.tokens[rows]
        tokens[:] = below(draws[:, :length], trigger)
        at, row = below(draws[:, length], length - 2), np.arange(len(tokens))
        tokens[row, at] = trigger
        tokens[:, -1] = trigger
        examples.targets[rows][:, -1] = tokens[row, at + 1]
    return examples


def toy_induction(
    count: int, *, length: int = 64, vocab_size: int = 128, seed: int, stream: tuple[int, ...] = ()
) -> Examples:
    """A list of distinct tokens, then pairs (x, successor of x in the list); the target stands at each x.

    .. code-block:: text

        tokens = t_1 ... t_n   x_1 s(x_1) ... x_m s(x_m)     n = length / 2, m = length / 4, s(t_i) = t_{i+1}

    The x are distinct, any of t_1..t_{n-1}. The answer is the successor in the list; later an x may also
    have been the answer of an earlier pair and stand before another x.

    Raises:
        ValueError: a length that 4 does not divide, a vocabulary below length / 2.
    """
    check_count("toy_induction", count)
    if length < 4 or length % 4:
        raise ValueError(f"toy_induction: length is {length}; expected a multiple of 4")
    listed, pairs = length // 2, length // 4
    if vocab_size < listed:
        raise ValueError(f"toy_induction: vocab_size {vocab_size} is too small for {listed} distinct tokens")
    examples = Examples.empty(count, length)
    for rows, draws in blocks(seed, stream, count, listed + pairs):
        tokens, targets = examples.tokens[rows], examples.targets[rows]
        tokens[:, :listed] = distinct(draws[:, :listed], vocab_size)
        chosen = distinct(draws[:, listed:], listed - 1)
        tokens[:, listed::2] = np.take_along_axis(tokens, chosen, 1)
        tokens[:, listed + 1 :: 2] = targets[:, listed::2] = np.take_along_axis(tokens, chosen + 1, 1)
    return examples
