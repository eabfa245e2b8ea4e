"""Set disjointness: exactly one shared token, uniform choices, one seed one data set."""

from __future__ import annotations

import numpy as np
import pytest

from seqmodels.tasks.recall.examples import NO_TARGET
from seqmodels.tasks.set_disjointness import FIRST_ELEMENT, set_disjointness

SIZES = [(4, 16), (16, 4), (1, 32), (32, 1), (1, 1), (512, 16), (60, 56)]


def lists(examples, first):
    return examples.tokens[:, 1 : first + 1], examples.tokens[:, first + 2 : -1]


@pytest.mark.parametrize(("first", "second"), SIZES)
def test_exactly_one_element_is_shared_and_it_is_the_target(first, second):
    vocab_size = 128 if first + second < 120 else 2048
    examples = set_disjointness(300, first=first, second=second, vocab_size=vocab_size, seed=1)
    assert examples.tokens.shape == examples.targets.shape == (300, first + second + 3)
    assert (examples.tokens[:, [0, first + 1, -1]] == [1, 2, 3]).all()
    for a, b, targets in zip(*lists(examples, first), examples.targets, strict=True):
        assert len(set(a)) == first
        assert len(set(b)) == second
        assert set(a) & set(b) == {targets[-1]}
        assert (targets[:-1] == NO_TARGET).all()
    elements = np.concatenate([part.ravel() for part in lists(examples, first)])
    assert elements.min() >= FIRST_ELEMENT
    assert elements.max() < vocab_size


def test_choices_are_uniform():
    """Chi-squared of the answer's id, its place in A and its place in B; 5 standard deviations of each statistic."""
    count, first, second, vocab_size = 20_000, 8, 12, 64
    examples = set_disjointness(count, first=first, second=second, vocab_size=vocab_size, seed=2)
    answer = examples.targets[:, -1:]
    a, b = lists(examples, first)
    for values, cells in (
        (answer[:, 0] - FIRST_ELEMENT, vocab_size - FIRST_ELEMENT),
        ((a == answer).argmax(1), first),
        ((b == answer).argmax(1), second),
        (a[:, 0] - FIRST_ELEMENT, vocab_size - FIRST_ELEMENT),
        (b[:, -1] - FIRST_ELEMENT, vocab_size - FIRST_ELEMENT),
    ):
        expected = count / cells
        chi_squared = ((np.bincount(values, minlength=cells) - expected) ** 2 / expected).sum()
        assert abs(chi_squared - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


def test_places_in_the_two_lists_are_independent():
    """Correlation of n pairs is 1 / sqrt(n) wide."""
    examples = set_disjointness(10_000, first=8, second=8, vocab_size=64, seed=3)
    a, b = lists(examples, 8)
    answer = examples.targets[:, -1:]
    correlation = np.corrcoef((a == answer).argmax(1), (b == answer).argmax(1))[0, 1]
    assert abs(correlation) < 5 / 100


def test_one_seed_is_one_data_set():
    """Pinned: the same on every platform and library version."""
    digests = {
        "small": set_disjointness(50, first=4, second=16, vocab_size=64, seed=0).digest(),
        "published": set_disjointness(200, first=4, second=768, seed=0, stream=(1,)).digest(),
    }
    assert digests == {"small": "52e422931fc38540", "published": "3d6317af0e6159c8"}


def test_a_larger_set_begins_with_a_smaller_one_and_streams_differ():
    small = set_disjointness(10, first=16, second=256, seed=5)
    large = set_disjointness(5000, first=16, second=256, seed=5)
    assert np.array_equal(large.tokens[:10], small.tokens)
    assert not np.array_equal(set_disjointness(10, first=16, second=256, seed=5, stream=(1,)).tokens, small.tokens)


def test_bad_sizes_name_the_value():
    with pytest.raises(ValueError, match="count is 0"):
        set_disjointness(0, first=1, second=1, seed=0)
    for sizes in ({"first": 0, "second": 4}, {"first": 33, "second": 4}):
        with pytest.raises(ValueError, match=f"first is {sizes['first']}; expected 1 to 32.*vocab_size=64"):
            set_disjointness(1, **sizes, vocab_size=64, seed=0)
    with pytest.raises(ValueError, match="second is 29; expected 1 to 28"):
        set_disjointness(1, first=1, second=29, vocab_size=64, seed=0)
