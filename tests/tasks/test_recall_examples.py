"""Raw draws: the laws that generators rely on, by counting, and scores by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from seqmodels.tasks.recall import examples as module
from seqmodels.tasks.recall.examples import (
    NO_TARGET,
    Examples,
    below,
    blocks,
    distinct,
    first_occurrence,
    power_weights,
    uniform,
    weighted_distinct,
)
from seqmodels.tasks.recall.metrics import Score

SIGMAS = 5  # of a count: a correct generator fails one such check in about two million


def draws(rows, width, seed=0):
    return np.concatenate([part for _, part in blocks(seed, (), rows, width)])


def check_counts(counts, expected):
    """Each count within SIGMAS binomial standard deviations of its expectation."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    for key, p in expected.items():
        assert abs(counts[key] - total * p) <= SIGMAS * math.sqrt(total * p * (1 - p)) + 1, (key, counts[key], p)


def test_blocks_are_one_stream(monkeypatch):
    whole = draws(50, 7)
    monkeypatch.setattr(module, "_BLOCK", 21)  # three rows at a time
    assert (draws(50, 7) == whole).all()
    assert (draws(20, 7) == whole[:20]).all()
    assert not (draws(50, 7, seed=1) == whole).any()


def test_below_and_uniform():
    found = below(draws(30_000, 1), 3)[:, 0]
    check_counts(Counter(found.tolist()), dict.fromkeys(range(3), 1 / 3))
    assert below(np.array([0, 2**64 - 1], np.uint64), 2**32).tolist() == [0, 2**32 - 1]
    real = uniform(np.array([0, 2**64 - 1], np.uint64))
    assert real.tolist() == [0.0, 1 - 2.0**-53]


@pytest.mark.parametrize(("pool", "k"), [(4, 2), (3, 3)])
def test_distinct_is_a_uniform_ordered_choice(pool, k):
    found = distinct(draws(24_000, k), pool)
    every = list(itertools.permutations(range(pool), k))
    check_counts(Counter(map(tuple, found.tolist())), dict.fromkeys(every, 1 / len(every)))


def test_distinct_of_a_large_pool_and_of_none():
    found = distinct(draws(40, 9), 1 << 16)
    assert all(len(set(row)) == 9 for row in found.tolist())
    with pytest.raises(ValueError, match="3 distinct values of a pool of 2"):
        distinct(draws(1, 3), 2)


def test_weighted_choice_takes_one_after_another():
    """P(i then j) = w_i / W * w_j / (W - w_i)."""
    weights = np.array([5.0, 2.0, 1.0])
    found = weighted_distinct(draws(40_000, 3), weights, 2)
    expected = {(i, j): weights[i] / 8 * weights[j] / (8 - weights[i]) for i, j in itertools.permutations(range(3), 2)}
    check_counts(Counter(map(tuple, found.tolist())), expected)
    with pytest.raises(ValueError, match="4 distinct"):
        weighted_distinct(draws(1, 3), weights, 4)


def test_logarithm_and_power_are_those_of_the_library_to_rounding():
    x = np.concatenate([uniform(draws(1000, 1))[:, 0], 2.0 ** -np.arange(1, 54), [0.7071067811865475, 1.0, 0.5]])
    x = x[x > 0]
    # Each of the series' few operations rounds once: a few units in the last place of a value.
    assert np.allclose(module._log(x), np.log(x), rtol=1e-15, atol=1e-15)
    assert power_weights(4, -0.5) == pytest.approx([i**-0.5 for i in range(1, 5)], rel=1e-15)


def test_first_occurrence():
    codes = np.array([[3, 1, 3, 3, 1], [0, 1, 2, 3, 4]])
    assert first_occurrence(codes).tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]


def test_digest_sees_tokens_targets_and_shape():
    one = Examples(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.int32))
    assert one.digest() == Examples(np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64)).digest()
    assert one.digest() != Examples(np.zeros((3, 2), np.int32), np.zeros((3, 2), np.int32)).digest()
    assert one.digest() != Examples(np.zeros((2, 3), np.int32), np.ones((2, 3), np.int32)).digest()


# Scores


def score(predictions, targets, classes=4):
    result = Score(classes)
    result.add(np.array(predictions), np.array(targets))
    return result


def test_scores_by_hand():
    found = score([[1, 1, 3], [2, 0, 0]], [[1, 2, NO_TARGET], [2, NO_TARGET, NO_TARGET]])
    assert found.accuracy() == pytest.approx(2 / 3)
    assert found.accuracy_by_example() == pytest.approx((1 / 2 + 1) / 2)
    # Class 1: 1 of 1; class 2: 1 of 2; classes 0 and 3 are neither target nor prediction.
    assert found.macro_accuracy() == pytest.approx((1 + 1 / 2) / 2)


def test_a_class_that_is_only_predicted_counts_as_wrong_unless_it_is_left_out():
    found = score([[3, 1]], [[1, 1]])
    assert found.macro_accuracy() == pytest.approx((1 / 2 + 0) / 2)
    assert found.macro_accuracy(count_predicted=False) == pytest.approx(1 / 2)


def test_scores_add_up_over_batches_and_skip_examples_without_labels():
    found = score([[1, 2]], [[1, 1]])
    found.add(np.array([[0, 0]]), np.array([[NO_TARGET, NO_TARGET]]))
    found.add(np.array([[2, 2]]), np.array([[2, 2]]))
    assert found.accuracy() == pytest.approx(3 / 4)
    assert found.accuracy_by_example() == pytest.approx((1 / 2 + 1) / 2)


def test_ties_go_to_the_smallest_id():
    """Constant logits score what id 0 scores."""
    logits = np.zeros((1, 4, 4))
    found = score(logits.argmax(-1), [[0, 1, 2, 0]])
    assert found.accuracy() == pytest.approx(1 / 2)


@pytest.mark.parametrize("targets", [np.full((2, 3), NO_TARGET), np.zeros((0, 3), int)])
def test_a_mean_of_nothing_is_an_error(targets):
    found = score(np.zeros_like(targets), targets)
    for metric in (found.accuracy, found.accuracy_by_example, found.macro_accuracy):
        with pytest.raises(ValueError, match="no labelled position"):
            metric()


def test_ids_and_shapes_are_checked():
    with pytest.raises(ValueError, match=r"a target is 4 to 4; expected ids of \[0, 4\)"):
        score([[0]], [[4]])
    with pytest.raises(ValueError, match="a prediction is -1"):
        score([[-1]], [[0]])
    with pytest.raises(ValueError, match="expected \\(count, length\\) both"):
        score([0], [0])
