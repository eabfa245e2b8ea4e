"""MAD's fuzzy in-context recall (arXiv:2403.17844): keys and values of one to three tokens."""

from __future__ import annotations

import numpy as np

from seqmodels.tasks.recall.examples import (
    NO_TARGET,
    Examples,
    below,
    blocks,
    check_count,
    distinct,
    first_occurrence,
)
from seqmodels.tasks.recall.registry import Split

MOTIF = 3  # the longest key and value


def fuzzy_recall(
    count: int,
    *,
    length: int = 128,
    vocab_size: int = 16,
    seed: int,
    stream: tuple[int, ...] = (),
    split: Split = "train",
) -> Examples:
    """In-context recall whose keys and values are motifs: sequences of 1 to 3 tokens without a repeat.

    .. code-block:: text

        pad pad  k v k v ... k' v'     ``length`` tokens of length + 1: the last value's end is only a target

    Key tokens are the lower half of ids [0, V - 1), value tokens the upper half, pad = V - 1. Sizes are
    uniform in 1..3; at test every key has 3. A key's value is drawn at its first showing. Pairs go on
    while the probe and a pair of the largest size still fit; the final probe k' is one key that was shown,
    in a place that is uniform over the pairs. Rows are padded on the left.

    Training targets are the next token everywhere, pads included; test targets the values of repeated keys
    and of the probe.

    Raises:
        ValueError: a length below 18 (probe, pair and probe again), a vocabulary with fewer than 3 keys.
    """
    check_count("fuzzy_recall", count)
    if length < 6 * MOTIF:
        raise ValueError(f"fuzzy_recall: length {length} is too short; expected at least {6 * MOTIF}")
    words = vocab_size - 1
    keys = words // 2
    if keys < MOTIF:
        raise ValueError(
            f"fuzzy_recall: vocab_size {vocab_size} gives {keys} key ids; motifs of {MOTIF} need {2 * MOTIF + 1}"
        )
    smallest = 2 if split == "train" else MOTIF + 1
    pairs = length // smallest + 1  # more are never shown
    whole = np.full((count, length + 1), vocab_size - 1, np.int32)
    answers = np.full((count, length + 1), NO_TARGET, np.int32)
    width = pairs * (2 + 2 * MOTIF) + 1
    for rows, draws in blocks(seed, stream, count, width):
        tokens, targets = _rows(draws, pairs, keys, words - keys, length, split)
        shown = tokens >= 0
        whole[rows] = np.where(shown, tokens, whole[rows])
        answers[rows] = targets
    return Examples(whole[:, :-1].copy(), (whole if split == "train" else answers)[:, 1:].copy())


def _rows(
    draws: np.ndarray, pairs: int, keys: int, values: int, length: int, split: Split
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, length + 1) with -1 for pads, and test targets."""
    rows, n = len(draws), pairs
    sizes, motifs, probe_draw = np.split(draws, [2 * n, (2 + 2 * MOTIF) * n], axis=1)
    key_size = 1 + below(sizes[:, :n], MOTIF) if split == "train" else np.full((rows, n), MOTIF)
    value_size = 1 + below(sizes[:, n:], MOTIF)
    motifs = motifs.reshape(rows, 2, n, MOTIF)
    key = distinct(motifs[:, 0].reshape(-1, MOTIF), keys).reshape(rows, n, MOTIF)
    value = keys + distinct(motifs[:, 1].reshape(-1, MOTIF), values).reshape(rows, n, MOTIF)
    key[np.arange(MOTIF) >= key_size[..., None]] = -1
    value[np.arange(MOTIF) >= value_size[..., None]] = -1
    base = keys + 1
    code = ((key[..., 0] + 1) * base + key[..., 1] + 1) * base + key[..., 2] + 1
    first = first_occurrence(code)
    value = np.take_along_axis(value, first[..., None], 1)  # a repeated key keeps its first value
    value_size = np.take_along_axis(value_size, first, 1)
    # Pairs are shown while the room that the largest probe and pair take is left.
    start = np.cumsum(key_size + value_size, 1) - key_size - value_size
    shown = start + 4 * MOTIF <= length
    chosen = below(probe_draw[:, 0], shown.sum(1))
    row = np.arange(rows)
    every_key = np.concatenate([np.where(shown[..., None], key, -1), key[row, chosen][:, None]], 1)
    every_value = np.concatenate([np.where(shown[..., None], value, -1), value[row, chosen][:, None]], 1)
    repeated = np.concatenate([shown & (first < np.arange(n)), np.ones((rows, 1), bool)], 1)
    sequence = np.concatenate([every_key, every_value], 2).reshape(rows, -1)
    asked = np.concatenate(
        [np.full_like(every_key, NO_TARGET), np.where(repeated[..., None], every_value, NO_TARGET)], 2
    )
    asked = np.where(sequence < 0, NO_TARGET, asked.reshape(rows, -1))
    # Pads (-1) move to the left, everything else keeps its order.
    order = np.argsort(sequence >= 0, axis=1, kind="stable")[:, -(length + 1) :]
    return np.take_along_axis(sequence, order, 1), np.take_along_axis(asked, order, 1)
