"""Multi-query associative recall (Zoology, arXiv:2312.04927; Based, arXiv:2402.18668)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from seqmodels.tasks.recall.examples import (
    Examples,
    below,
    blocks,
    check_count,
    distinct,
    power_weights,
    weighted_distinct,
)

Filler = Literal["zero", "random"]


def mqar(
    count: int,
    *,
    length: int = 64,
    pairs: int = 4,
    vocab_size: int = 8192,
    power: float = 0.01,
    filler: Filler = "zero",
    seed: int,
    stream: tuple[int, ...] = (),
) -> Examples:
    """``pairs`` keys with their values, then each key once more, where its value is the target.

    .. code-block:: text

        tokens  = k_1 v_1 ... k_D v_D, then a tail of length - 2 D
        tail    : k_j at tail position 2 s_j, its target v_j (which is not written after it); filler elsewhere

    Keys are D distinct ids of [1, V/2), values D distinct ids of [V/2, V). The s_j are distinct, drawn one
    after another from 0..S-1 with S = (length - 2 D) // 2 and p(s) proportional to (s + 1)^(power - 1): most
    queries come soon after the pairs, few late.

    Args:
        power: a in the power law of the gaps.
        filler: ``"zero"`` (Zoology): id 0, which is no key and no value. ``"random"`` (Based): uniform over
            all V ids, so that a filler may be a key or a value of the example; so the published data is.
        seed, stream: name the data set; different streams of a seed are independent.

    Raises:
        ValueError: length below 4 D (no room for all queries), a vocabulary that does not exceed the length
            or has fewer than D keys, an unknown filler.
    """
    check_count("mqar", count)
    if pairs < 1:
        raise ValueError(f"mqar: pairs is {pairs}; expected at least 1")
    if length < 4 * pairs:
        raise ValueError(
            f"mqar: length {length} is too short for {pairs} pairs and {pairs} queries; "
            f"expected at least {4 * pairs}, or at most {length // 4} pairs"
        )
    if vocab_size <= length or vocab_size // 2 - 1 < pairs:
        raise ValueError(
            f"mqar: vocab_size {vocab_size} is too small; expected more than the length {length}, "
            f"and at least {2 * pairs + 2} for {pairs} keys"
        )
    if filler not in ("zero", "random"):
        raise ValueError(f"mqar: filler is {filler!r}; expected 'zero' or 'random'")
    context, half = 2 * pairs, vocab_size // 2
    slots = (length - context) // 2
    weights = power_weights(slots, power - 1)
    examples = Examples.empty(count, length)
    ends = np.cumsum([pairs, pairs, slots, length - context if filler == "random" else 0])
    for rows, draws in blocks(seed, stream, count, int(ends[-1])):
        key_draws, value_draws, slot_draws, filler_draws = np.split(draws, ends[:-1], axis=1)
        tokens, targets = examples.tokens[rows], examples.targets[rows]
        keys = 1 + distinct(key_draws, half - 1)
        values = half + distinct(value_draws, vocab_size - half)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        if filler == "random":
            tokens[:, context:] = below(filler_draws, vocab_size)
        at = context + 2 * weighted_distinct(slot_draws, weights, pairs)
        np.put_along_axis(tokens, at, keys.astype(np.int32), 1)
        np.put_along_axis(targets, at, values.astype(np.int32), 1)
    return examples
