"""MAD's synthetic tasks (arXiv:2403.17844): recall, selective copying, compression, memorization.

Training examples of the recall tasks have the next token as target everywhere; test examples have targets
only where the answer is determined: values of keys that came before, and the final probe.
"""

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
    uniform,
)
from seqmodels.tasks.recall.registry import Split

__all__ = ["compression", "in_context_recall", "mad_selective_copying", "memorization", "noisy_recall"]


def in_context_recall(
    count: int,
    *,
    length: int = 128,
    vocab_size: int = 16,
    seed: int,
    stream: tuple[int, ...] = (),
    split: Split = "train",
) -> Examples:
    """Key-value pairs of a map that each example has for itself, at last a key that came before.

    .. code-block:: text

        k v k v ... k v k'     length - 1 tokens: length / 2 - 1 pairs and the probe k', one of their keys

    Keys are ids of [0, V/2), values of [V/2, V). Keys are drawn with replacement, and each key's value once
    per example, with replacement, so that two keys may share one.

    Raises:
        ValueError: an odd length or one below 4, a vocabulary below 4.
    """
    return _recall("in_context_recall", count, length, vocab_size, 0, 0.0, seed, stream, split)


def noisy_recall(
    count: int,
    *,
    length: int = 128,
    vocab_size: int = 32,
    noise_vocab_size: int = 16,
    noise: float = 0.2,
    seed: int,
    stream: tuple[int, ...] = (),
    split: Split = "train",
) -> Examples:
    """:func:`in_context_recall` in which each pair, but for one, becomes two noise ids with probability ``noise``.

    Noise ids are the last ``noise_vocab_size`` of the vocabulary; keys and values share the others.

    Raises:
        ValueError: as there, no noise ids, a probability outside [0, 1).
    """
    if noise_vocab_size < 1 or not 0 <= noise < 1:
        raise ValueError(
            f"noisy_recall: noise_vocab_size={noise_vocab_size}, noise={noise}; expected at least 1, and 0 <= noise < 1"
        )
    return _recall("noisy_recall", count, length, vocab_size, noise_vocab_size, noise, seed, stream, split)


def _recall(
    name: str,
    count: int,
    length: int,
    vocab_size: int,
    noise_vocab_size: int,
    noise: float,
    seed: int,
    stream: tuple[int, ...],
    split: Split,
) -> Examples:
    check_count(name, count)
    if length < 4 or length % 2:
        raise ValueError(f"{name}: length is {length}; expected an even number of at least 4")
    words = vocab_size - noise_vocab_size
    if words < 4:
        raise ValueError(f"{name}: vocab_size {vocab_size} leaves {words} ids for keys and values; expected at least 4")
    keys, pairs = words // 2, length // 2 - 1
    whole, answers = np.empty((count, length), np.int32), np.full((count, length), NO_TARGET, np.int32)
    ends = np.cumsum([keys, pairs, 1, pairs, 2 * pairs, 1] if noise else [keys, pairs, 1])
    for rows, draws in blocks(seed, stream, count, int(ends[-1])):
        value_draws, key_draws, probe_draw, *rest = np.split(draws, ends[:-1], axis=1)
        row = np.arange(len(draws))
        values = keys + below(value_draws, words - keys)
        key = below(key_draws, keys)
        kept = np.ones_like(key, dtype=bool)
        if noise:
            kept = uniform(rest[0]) >= noise
            kept[row, below(rest[2][:, 0], pairs)] = True
        # The probe is one of the distinct keys that were shown, each equally likely.
        shown = np.zeros((len(row), keys), bool)
        at = np.nonzero(kept)
        shown[at[0], key[at]] = True
        rank = below(probe_draw[:, 0], shown.sum(1))
        probe = (np.cumsum(shown, 1) > rank[:, None]).argmax(1)
        value = np.take_along_axis(values, key, 1)
        tokens, targets = whole[rows], answers[rows]
        tokens[:, 0:-2:2], tokens[:, 1:-2:2] = key, value
        tokens[:, -2], tokens[:, -1] = probe, values[row, probe]
        # A key that was noise stands apart from all keys, so that it is the first of nothing.
        codes = np.where(kept, key, keys + np.arange(pairs))
        repeated = kept & (first_occurrence(codes) < np.arange(pairs))
        targets[:, 1:-2:2] = np.where(repeated, value, NO_TARGET)
        targets[:, -1] = tokens[:, -1]
        if noise:
            noisy = words + below(rest[1], noise_vocab_size)
            tokens[:, 0:-2:2] = np.where(kept, key, noisy[:, :pairs])
            tokens[:, 1:-2:2] = np.where(kept, value, noisy[:, pairs:])
    return Examples(whole[:, :-1].copy(), (whole if split == "train" else answers)[:, 1:].copy())


def mad_selective_copying(
    count: int,
    *,
    length: int = 256,
    data: int = 16,
    vocab_size: int = 16,
    seed: int,
    stream: tuple[int, ...] = (),
) -> Examples:
    """Data among blanks, a copy token, and blanks at which the data is the target, in order.

    .. code-block:: text

        data and length - 2 C - 1 blanks (id V - 2) mixed, copy (id V - 1), C blanks     C = data

    Data is uniform over ids of [0, V - 2) and keeps its order; a blank goes before a data token that each
    blank chooses at random, so that the last token before the copy token is data.

    Raises:
        ValueError: a length below 2 C + 1, a vocabulary below 4.
    """
    check_count("mad_selective_copying", count)
    blanks = length - 2 * data - 1
    if data < 1 or blanks < 0:
        raise ValueError(f"mad_selective_copying: length {length} is too short; {data} tokens need {2 * data + 1}")
    if vocab_size < 4:
        raise ValueError(f"mad_selective_copying: vocab_size is {vocab_size}; expected at least 4")
    examples = Examples.empty(count, length, vocab_size - 2)
    for rows, draws in blocks(seed, stream, count, data + blanks):
        tokens = examples.tokens[rows]
        values = below(draws[:, :data], vocab_size - 2)
        before = below(draws[:, data:], data)  # the data token that each blank stands before
        blanks_before = np.zeros((len(draws), data), np.int64)
        np.add.at(blanks_before, (np.arange(len(draws))[:, None], before), 1)
        np.put_along_axis(tokens, np.arange(data) + np.cumsum(blanks_before, 1), values.astype(np.int32), 1)
        tokens[:, data + blanks] = vocab_size - 1
        examples.targets[rows][:, -data:] = values
    return examples


def compression(
    count: int, *, length: int = 32, vocab_size: int = 16, seed: int, stream: tuple[int, ...] = ()
) -> Examples:
    """Random ids and an end token V - 1, from whose hidden vector every token is to be reproduced.

    Rows have ``length`` tokens, the end token among them; the target of a position is its own token, and the
    readout ``last`` sees only the last hidden vector and the position.

    Raises:
        ValueError: a length below 2, a vocabulary below 3.
    """
    check_count("compression", count)
    if length < 2 or vocab_size < 3:
        raise ValueError(f"compression: length {length}, vocab_size {vocab_size}; expected at least 2 and 3")
    examples = Examples.empty(count, length, vocab_size - 1)
    for rows, draws in blocks(seed, stream, count, length - 1):
        examples.tokens[rows][:, :-1] = below(draws, vocab_size - 1)
    examples.targets[:] = examples.tokens
    return examples


def memorization(
    count: int,
    *,
    length: int = 32,
    vocab_size: int = 256,
    map_seed: int = 12345,
    seed: int,
    stream: tuple[int, ...] = (),
) -> Examples:
    """One key-value map for the whole task, in no example: keys are shown, their values are the targets.

    .. code-block:: text

        k ins k ins ...     ins = V - 1, the target at each ins is its key's value

    Keys are ids of [0, h) with h = (V - 1) // 2, drawn with replacement; values are distinct ids of
    [h, V - 1). ``map_seed`` names the map.

    Raises:
        ValueError: an odd length, a vocabulary below 5.
    """
    check_count("memorization", count)
    if length < 2 or length % 2:
        raise ValueError(f"memorization: length is {length}; expected an even number")
    if vocab_size < 5:
        raise ValueError(f"memorization: vocab_size is {vocab_size}; expected at least 5")
    keys = (vocab_size - 1) // 2
    ((_, draws),) = blocks(map_seed, (), 1, keys)
    values = (keys + distinct(draws, vocab_size - 1 - keys))[0]
    examples = Examples.empty(count, length, vocab_size - 1)
    for rows, draws in blocks(seed, stream, count, length // 2):
        key = below(draws, keys)
        examples.tokens[rows][:, 0::2] = key
        examples.targets[rows][:, 1::2] = values[key]
    return examples
