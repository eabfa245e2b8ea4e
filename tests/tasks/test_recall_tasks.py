"""Recall generators: every answer found again by reading the tokens, statistics, checksums, refusals."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from seqmodels.tasks.recall import registry
from seqmodels.tasks.recall.examples import NO_TARGET, Examples
from seqmodels.tasks.recall.induction import induction_heads, toy_induction
from seqmodels.tasks.recall.mad import (
    compression,
    in_context_recall,
    mad_selective_copying,
    memorization,
    noisy_recall,
)
from seqmodels.tasks.recall.mad_fuzzy import fuzzy_recall
from seqmodels.tasks.recall.mqar import mqar
from seqmodels.tasks.recall.registry import TASKS, generate, row_length, task_named, vocab_size
from seqmodels.tasks.recall.selective_copying import selective_copying
from seqmodels.tasks.recall.word_problems import GROUPS, multiplication_table, word_problem

SMALL = {
    "mqar": dict(length=40, pairs=5, vocab_size=64),
    "induction_heads": dict(length=24),
    "toy_induction": dict(length=32, vocab_size=20),
    "selective_copying": dict(length=40, data=6),
    "in_context_recall": dict(length=40),
    "noisy_recall": dict(length=40),
    "fuzzy_recall": dict(length=40),
    "mad_selective_copying": dict(length=40, data=5),
    "compression": dict(length=10),
    "memorization": dict(length=10, vocab_size=20),
    "set_disjointness": dict(first=4, second=7, vocab_size=64),
    "word_problem": dict(group="A5", length=6),
}
# Of 32 examples with the settings above, seed 3, stream (1, 2). A change here is another data set: never update it.
CHECKSUMS = {
    "mqar": "17a6da6a1154c228",
    "induction_heads": "a35dade4bce17b30",
    "toy_induction": "ded57005be8bc3bd",
    "selective_copying": "3ceb7795672e2b81",
    "in_context_recall": "0cd82eaa3bd8750b",
    "noisy_recall": "b999c3d8e4c06ec3",
    "fuzzy_recall": "5e6ff870034e2b34",
    "mad_selective_copying": "9704f79a2c5f899b",
    "compression": "4061362329d33efa",
    "memorization": "1a4fba0e2bc3368f",
    "set_disjointness": "0227752b30283921",
    "word_problem": "573a267fa251d8ad",
}


def rows(examples: Examples):
    return zip(examples.tokens.tolist(), examples.targets.tolist(), strict=True)


def asked(target):
    return [(at, value) for at, value in enumerate(target) if value != NO_TARGET]


def near(count, total, p, sigmas=5):
    return abs(count - total * p) <= sigmas * math.sqrt(total * p * (1 - p)) + 1


def test_every_task_is_here():
    assert set(SMALL) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_one_seed_is_one_data_set(name):
    def make(count, **options):
        return generate(name, count, SMALL[name], **{"seed": 3, "stream": (1, 2), **options})

    found = make(32)
    assert found.digest() == CHECKSUMS[name]
    assert found.tokens.dtype == found.targets.dtype == np.int32
    more = make(48)
    assert (more.tokens[:32] == found.tokens).all()
    assert (more.targets[:32] == found.targets).all()
    assert make(32, seed=4).digest() != found.digest()
    assert make(32, stream=(1, 3)).digest() != found.digest()
    size = vocab_size(name, SMALL[name])
    assert found.tokens.min() >= 0
    assert max(found.tokens.max(), found.targets.max()) < size
    assert found.tokens.shape[1] == row_length(name, SMALL[name])
    with pytest.raises(ValueError, match="count is 0"):
        make(0)


# Multi-query associative recall


@pytest.mark.parametrize("filler", ["zero", "random"])
def test_mqar_answers_are_the_values_of_the_keys(filler):
    length, pairs, vocab = 40, 5, 64
    for tokens, target in rows(mqar(300, length=length, pairs=pairs, vocab_size=vocab, filler=filler, seed=0)):
        book = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(book) == pairs == len(set(book.values()))
        assert all(1 <= key < vocab // 2 <= value < vocab for key, value in book.items())
        found = asked(target)
        assert sorted(tokens[at] for at, _ in found) == sorted(book)
        assert all(book[tokens[at]] == value and at >= 2 * pairs and at % 2 == 0 for at, value in found)
        if filler == "zero":
            queried = {at for at, _ in found}
            assert all(tokens[at] == 0 for at in range(2 * pairs, length) if at not in queried)


def test_mqar_gaps_follow_the_power_law():
    """The first query's slot s has p(s) proportional to (s + 1)^(power - 1); keys are uniform."""
    count, power, slots = 20_000, 0.5, 6
    examples = mqar(count, length=14, pairs=1, vocab_size=32, power=power, seed=1)
    weights = [(s + 1) ** (power - 1) for s in range(slots)]
    at = Counter(((examples.targets != NO_TARGET).argmax(1) - 2).tolist())
    assert set(at) == {2 * s for s in range(slots)}
    for s, weight in enumerate(weights):
        assert near(at[2 * s], count, weight / sum(weights))
    for key, seen in Counter(examples.tokens[:, 0].tolist()).items():
        assert 1 <= key < 16
        assert near(seen, count, 1 / 15)


def test_mqar_random_filler_is_uniform():
    examples = mqar(2000, length=14, pairs=1, vocab_size=32, filler="random", seed=1)
    tail = examples.tokens[:, 2:][examples.targets[:, 2:] == NO_TARGET]
    for seen in np.bincount(tail, minlength=32):
        assert near(seen, tail.size, 1 / 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pairs=0), "pairs is 0"),
        (dict(pairs=11), "length 40 is too short for 11 pairs.*at least 44, or at most 10 pairs"),
        (dict(vocab_size=40), "vocab_size 40 is too small; expected more than the length 40"),
        (dict(filler="noise"), "expected 'zero' or 'random'"),
    ],
)
def test_mqar_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        mqar(1, **{**SMALL["mqar"], **change}, seed=0)


# Induction and copying


def test_induction_heads():
    count, length = 4000, 12
    examples = induction_heads(count, length=length, vocab_size=6, seed=2)
    places = Counter()
    for tokens, target in rows(examples):
        assert tokens.count(5) == 2
        at = tokens.index(5)
        places[at] += 1
        assert tokens[-1] == 5
        assert asked(target) == [(length - 1, tokens[at + 1])]
        assert tokens[at + 1] != 5
    assert set(places) == set(range(length - 2))
    assert all(near(seen, count, 1 / (length - 2)) for seen in places.values())
    # Every other token is uniform over the other ids, the answer too.
    for ids in (examples.tokens[examples.tokens != 5], examples.targets[:, -1]):
        assert all(near(seen, ids.size, 1 / 5) for seen in np.bincount(ids, minlength=5))


def test_toy_induction():
    examples = toy_induction(200, length=32, vocab_size=20, seed=2)
    listed = np.bincount(examples.tokens[:, :16].ravel(), minlength=20)
    assert all(near(seen, 200, 16 / 20) for seen in listed)  # each id is listed in 16 of 20 examples
    places = Counter(tokens[:16].index(x) for tokens, _ in rows(examples) for x in tokens[16::2])
    assert all(near(places[place], 200, 8 / 15) for place in range(15))  # asked in 8 of 15
    for tokens, target in rows(examples):
        listed = tokens[:16]
        assert len(set(listed)) == 16
        pairs = list(zip(tokens[16::2], tokens[17::2], strict=True))
        assert len({x for x, _ in pairs}) == 8
        assert all(listed[listed.index(x) + 1] == y for x, y in pairs)
        assert asked(target) == [(16 + 2 * i, y) for i, (_, y) in enumerate(pairs)]


def test_selective_copying():
    count, length, data = 3000, 10, 3
    examples = selective_copying(count, length=length, data=data, vocab_size=5, seed=2)
    for tokens, target in rows(examples):
        said = [token for token in tokens[:length] if token]
        assert len(said) == data
        assert all(1 <= token <= 3 for token in said)
        assert tokens[length:] == [4] * data
        assert asked(target) == list(zip(range(length, length + data), said, strict=True))
    for seen in (examples.tokens[:, :length] != 0).sum(0):
        assert near(seen, count, data / length)
    said = examples.targets[:, length:]
    assert all(near(seen, said.size, 1 / 3) for seen in np.bincount(said.ravel(), minlength=4)[1:4])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (induction_heads, dict(length=2), "length 2 is too short"),
        (induction_heads, dict(vocab_size=2), "vocab_size 2 is too small"),
        (toy_induction, dict(length=30), "multiple of 4"),
        (toy_induction, dict(length=64, vocab_size=31), "too small for 32 distinct"),
        (selective_copying, dict(length=4, data=5), "5 data tokens in a length of 4"),
        (selective_copying, dict(vocab_size=3), "at least 4"),
        (in_context_recall, dict(length=7), "expected an even number"),
        (in_context_recall, dict(vocab_size=3), "leaves 3 ids"),
        (noisy_recall, dict(vocab_size=18), "leaves 2 ids"),
        (noisy_recall, dict(noise=1.0), "0 <= noise < 1"),
        (fuzzy_recall, dict(length=17), "at least 18"),
        (fuzzy_recall, dict(vocab_size=6), "gives 2 key ids"),
        (mad_selective_copying, dict(length=32, data=16), "need 33"),
        (mad_selective_copying, dict(vocab_size=3), "at least 4"),
        (compression, dict(length=1), "expected at least 2"),
        (memorization, dict(length=3), "even"),
        (memorization, dict(vocab_size=4), "at least 5"),
        (word_problem, dict(group="S4"), "unknown group 'S4'"),
        (word_problem, dict(length=0), "length is 0"),
        (word_problem, dict(train_fraction=1.0), "between 0 and 1"),
    ],
)
def test_refusals(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(1, **options, seed=0)


# MAD


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_mad_recall_by_reading(noise):
    """Answers stand at the keys that came before, and nowhere else; training has all next tokens."""
    options = dict(length=40, vocab_size=24, noise_vocab_size=8, noise=noise, seed=5)
    test, train = (noisy_recall(400, **options, split=split) for split in ("test", "train"))
    assert (test.tokens == train.tokens).all()
    assert (train.targets[:, :-1] == train.tokens[:, 1:]).all()
    noisy = 0
    for (tokens, target), last in zip(rows(test), train.targets[:, -1].tolist(), strict=True):
        book, expected = {}, []
        for at in range(0, 38, 2):
            key, value = tokens[at : at + 2]
            if key >= 16:
                noisy += 1
                assert value >= 16
                continue
            assert key < 8 <= value < 16
            if key in book:
                assert book[key] == value
                expected.append((at, value))
            book[key] = value
        assert book
        expected.append((38, book[tokens[38]]))
        assert asked(target) == expected
        assert last == book[tokens[38]]
    # One pair of the 19 is protected from the noise, whichever it is.
    assert near(noisy, 400 * 19, noise * 18 / 19, sigmas=6)


def test_mad_recall_draws_are_uniform():
    examples = in_context_recall(2000, length=12, vocab_size=8, seed=1)
    keys, values = examples.tokens[:, 0:-1:2], examples.tokens[:, 1::2]
    assert all(near(seen, keys.size, 1 / 4) for seen in np.bincount(keys.ravel(), minlength=4))
    firsts = np.bincount(values[:, 0], minlength=8)  # one value an example: later ones repeat it
    assert firsts[:4].sum() == 0
    assert all(near(seen, 2000, 1 / 4) for seen in firsts[4:])
    copied = mad_selective_copying(2000, length=20, data=4, vocab_size=8, seed=5).targets[:, -4:]
    assert all(near(seen, copied.size, 1 / 6) for seen in np.bincount(copied.ravel(), minlength=6))
    noisy = noisy_recall(2000, length=12, vocab_size=12, noise_vocab_size=4, noise=0.5, seed=1).tokens
    noise = noisy[noisy >= 8]
    assert all(near(seen, noise.size, 1 / 4) for seen in np.bincount(noise, minlength=12)[8:])


def test_mad_recall_probe_is_any_shown_key():
    examples = in_context_recall(20_000, length=6, vocab_size=4, seed=1, split="test")
    both = (examples.tokens[:, 0] != examples.tokens[:, 2]).nonzero()[0]
    assert near((examples.tokens[both, 4] == examples.tokens[both, 0]).sum(), len(both), 1 / 2)


def parse_fuzzy(tokens, last, keys, values):
    """Pairs (key, value) of motifs in order, and the place of each value's first token; pads are cut."""
    sequence = [*tokens, last]
    pad = keys + values
    start = next(at for at, token in enumerate(sequence) if token != pad)
    assert all(token == pad for token in sequence[:start])
    pairs = []
    for is_key, group in itertools.groupby(enumerate(sequence[start:], start), key=lambda item: item[1] < keys):
        group = list(group)
        motif = tuple(token for _, token in group)
        if is_key:
            pairs.append([motif, None, None])
        else:
            pairs[-1][1:] = [motif, group[0][0]]
    return pairs


@pytest.mark.parametrize("split", ["train", "test"])
def test_fuzzy_recall_by_reading(split):
    length, vocab = 60, 9
    examples = fuzzy_recall(300, length=length, vocab_size=vocab, seed=5, split=split)
    assert examples.tokens.shape == (300, length)
    sizes = Counter()
    for tokens, target in rows(examples):
        if split == "train":
            assert target[:-1] == tokens[1:]
        pairs = parse_fuzzy(tokens, target[-1], 4, 4)
        book, expected = {}, []
        for key, value, _ in pairs:
            assert len(key) == 3 if split == "test" else 1 <= len(key) <= 3
            assert 1 <= len(value) <= 3
            assert len(set(key)) == len(key)
            assert len(set(value)) == len(value)
            assert book.setdefault(key, value) == value
            sizes[len(key)] += 1
        seen = set()
        for index, (key, value, at) in enumerate(pairs):
            if key in seen:
                expected += [(at - 1 + i, token) for i, token in enumerate(value)]
            else:
                assert index < len(pairs) - 1  # the probe was shown
            seen.add(key)
        if split == "test":
            assert asked(target) == expected
    assert set(sizes) == ({3} if split == "test" else {1, 2, 3})
    # Of the first pair, which is always shown, sizes are uniform and so is each motif's first token.
    if split == "train":
        motifs = [parse_fuzzy(tokens, target[-1], 4, 4)[0] for tokens, target in rows(examples)]
        for place in (0, 1):
            assert all(near(sum(len(pair[place]) == n for pair in motifs), 300, 1 / 3) for n in (1, 2, 3))
            heads = Counter(pair[place][0] for pair in motifs)
            assert len(heads) == 4
            assert all(near(seen, 300, 1 / 4) for seen in heads.values())


def test_mad_selective_copying():
    count, length, data = 2000, 20, 4
    examples = mad_selective_copying(count, length=length, data=data, vocab_size=8, seed=5)
    body = length - data - 1
    for tokens, target in rows(examples):
        said = [token for token in tokens[:body] if token != 6]
        assert len(said) == data
        assert all(token < 6 for token in said)
        assert tokens[body - 1] != 6
        assert tokens[body:] == [7] + [6] * data
        assert asked(target) == list(zip(range(length - data, length), said, strict=True))
    # Each of the 11 blanks stands before the first token with probability 1 / 4.
    before = (examples.tokens[:, :body] != 6).argmax(1).sum()
    assert near(before, count * 11, 1 / 4)


def test_compression_and_memorization():
    examples = compression(200, length=10, vocab_size=5, seed=5)
    assert (examples.tokens == examples.targets).all()
    assert (examples.tokens[:, -1] == 4).all()
    assert set(np.unique(examples.tokens[:, :-1])) == {0, 1, 2, 3}
    assert all(near(seen, 200 * 9, 1 / 4) for seen in np.bincount(examples.tokens[:, :-1].ravel()))
    one, other = (memorization(200, length=10, vocab_size=20, seed=seed) for seed in (5, 6))
    for found in (one, other):
        assert (found.tokens[:, 1::2] == 19).all()
        assert (found.targets[:, 0::2] == NO_TARGET).all()
    books = [dict(zip(e.tokens[:, 0::2].flat, e.targets[:, 1::2].flat, strict=True)) for e in (one, other)]
    assert books[0] == books[1]
    assert set(books[0]) == set(range(9))
    assert all(near(seen, 200 * 5, 1 / 9) for seen in np.bincount(one.tokens[:, 0::2].ravel()))
    assert len(set(books[0].values())) == 9
    assert all(9 <= value < 19 for value in books[0].values())
    assert books[0] != dict(
        zip(*(a.flat for a in (lambda e: (e.tokens[:, 0::2], e.targets[:, 1::2]))(
            memorization(200, length=10, vocab_size=20, map_seed=1, seed=5))), strict=True)
    )  # fmt: skip


# Word problems


@pytest.mark.parametrize(("group", "order", "commutes"), [
    ("S3", 6, False), ("S5", 120, False), ("A5", 60, False), ("A4xZ5", 60, False), ("Z60", 60, True),
])  # fmt: skip
def test_groups(group, order, commutes):
    table = multiplication_table(group)
    assert table.shape == (order, order)
    every = np.arange(order)
    assert (table[0] == every).all()
    assert (table[:, 0] == every).all()
    assert all((np.sort(row) == every).all() for row in (*table, *table.T))
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 2000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == commutes


def test_a5_is_its_own_commutator_subgroup_and_a4xz5_is_not():
    """What makes the one not solvable and the other solvable."""
    sizes = {}
    for group in ("A5", "A4xZ5", "S3"):
        table = multiplication_table(group)
        inverse = (table == 0).argmax(1)
        commutators = np.unique(table[table, table[np.ix_(inverse, inverse)]])
        closed = set(commutators.tolist())
        while (larger := {int(table[x, y]) for x in closed for y in closed}) != closed:
            closed = larger
        sizes[group] = len(closed)
    assert sizes == {"A5": 60, "A4xZ5": 4, "S3": 3}


@pytest.mark.parametrize(("group", "length"), [("S3", 4), ("A5", 7)])
def test_word_problems(group, length):
    table = multiplication_table(group)
    train, test = (word_problem(400, group=group, length=length, seed=1, split=split) for split in ("train", "test"))
    sets = []
    for examples in (train, test):
        found = [tuple(row) for row in examples.tokens.tolist()]
        assert len(set(found)) == len(found)
        sets.append(set(found))
        for tokens, target in rows(examples):
            product = 0
            for token, answer in zip(tokens, target, strict=True):
                product = int(table[product, token])
                assert answer == product
    assert not sets[0] & sets[1]


def test_a_small_word_problem_is_enumerated():
    train, test = (word_problem(10_000, group="S3", length=2, seed=1, split=split) for split in ("train", "test"))
    assert (len(train.tokens), len(test.tokens)) == (28, 8)


def test_elements_are_uniform():
    examples = word_problem(3000, group="A5", length=6, seed=1)
    for seen in np.bincount(examples.tokens.ravel(), minlength=60):
        assert near(seen, examples.tokens.size, 1 / 60)


# By name


def test_names_and_settings_are_checked():
    with pytest.raises(ValueError, match=r"unknown task 'mqarr'.*Did you mean mqar"):
        task_named("mqarr")
    with pytest.raises(ValueError, match=r"unknown setting 'pair'.*Did you mean pairs"):
        generate("mqar", 1, dict(pair=3), seed=0)
    with pytest.raises(ValueError, match="setting first, second is missing"):
        generate("set_disjointness", 1, {}, seed=0)
    assert vocab_size("word_problem", dict(group="S5")) == 120
    assert GROUPS == ("S3", "S5", "A5", "A4xZ5", "Z60")
    assert registry.task_named("in_context_recall").metric == "macro_accuracy"
