"""Selective copying (Mamba, arXiv:2312.00752): data among noise, to be said again in order."""

from __future__ import annotations

import numpy as np

from seqmodels.tasks.recall.examples import Examples, below, blocks, check_count, distinct


def selective_copying(
    count: int,
    *,
    length: int = 4096,
    data: int = 16,
    vocab_size: int = 16,
    seed: int,
    stream: tuple[int, ...] = (),
) -> Examples:
    """``data`` tokens at random places among noise, then as many markers, where the targets are the data in order.

    .. code-block:: text

        tokens = 0 0 a 0 b 0 0 0 c 0   M M M        targets a b c at the markers

    Noise is id 0, the marker M = vocab_size - 1, data is uniform over the ids between. ``length`` is the
    part before the markers; rows have length + data tokens.

    Raises:
        ValueError: more data than places, a vocabulary below 4.
    """
    check_count("selective_copying", count)
    if not 1 <= data <= length:
        raise ValueError(f"selective_copying: {data} data tokens in a length of {length}; expected 1 to {length}")
    if vocab_size < 4:
        raise ValueError(
            f"selective_copying: vocab_size is {vocab_size}; expected noise, marker and 2 more: at least 4"
        )
    examples = Examples.empty(count, length + data)
    for rows, draws in blocks(seed, stream, count, 2 * data):
        tokens = examples.tokens[rows]
        values = 1 + below(draws[:, data:], vocab_size - 2)
        np.put_along_axis(tokens, np.sort(distinct(draws[:, :data], length), 1), values.astype(np.int32), 1)
        tokens[:, length:] = vocab_size - 1
        examples.targets[rows][:, length:] = values
    return examples
