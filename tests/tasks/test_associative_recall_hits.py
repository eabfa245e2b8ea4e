"""AR hits and pair counts on hand-made cases, against definitions written out as loops."""

from __future__ import annotations

import collections
import math
import tracemalloc

import numpy as np
import pytest

from seqmodels.tasks.associative_recall_hits import HitLoss, Slice, gap_share, repeat_distances, slice_order
from seqmodels.tasks.bigrams import BigramCounter, pair_keys
from seqmodels.tasks.recall.examples import below
from seqmodels.tasks.shuffle import raw_draws


def draws(count, bound, seed=0):
    return below(raw_draws(seed, count=count), bound).astype(np.int64)


# Counting


def true_counts(documents):
    counter = collections.Counter()
    for document in documents:
        counter.update(zip(document[:-1].tolist(), document[1:].tolist(), strict=True))
    return counter


def keys_of(pairs):
    return np.concatenate([pair_keys(np.array(pair)) for pair in pairs])


def test_counts_by_hand():
    counter = BigramCounter()
    counter.add(np.array([5, 6, 5, 6, 7]))
    counter.add(np.array([7, 5]))
    counter.add(np.array([9]))  # no pair
    counter.add(np.array([], np.int64))
    found = counter.counts(keys_of([(5, 6), (6, 5), (6, 7), (7, 5), (7, 9), (0, 0)]))
    assert found.tolist() == [2, 1, 1, 1, 0, 0]  # no pair crosses from one document to the next
    assert counter.error == 0
    assert counter.pairs == 5


def test_an_empty_counter_knows_nothing():
    assert BigramCounter().counts(keys_of([(1, 2)])).tolist() == [0]
    assert BigramCounter().counts(np.zeros(0, np.uint64)).tolist() == []


def test_large_ids_do_not_collide():
    counter = BigramCounter()
    counter.add(np.array([2**32 - 1, 0, 2**32 - 1], np.int64))
    assert counter.counts(keys_of([(2**32 - 1, 0), (0, 2**32 - 1), (0, 0)])).tolist() == [1, 1, 0]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_counts_are_exact_while_they_fit(chunk):
    documents = [draws(200, 12, seed) for seed in range(5)]
    expected = true_counts(documents)
    counter = BigramCounter(capacity=len(expected), chunk=chunk)
    for document in documents:
        counter.add(document)
    assert counter.counts(keys_of(expected)).tolist() == list(expected.values())
    assert counter.error == 0


@pytest.mark.parametrize("chunk", [1, 16, 300])
@pytest.mark.parametrize("capacity", [1, 10, 60])
def test_bounded_counts_keep_their_promise(capacity, chunk):
    # Squares of uniform draws: some pairs are much commoner than others.
    documents = [draws(300, 12, seed) ** 2 // 12 for seed in range(6)]
    expected = true_counts(documents)
    assert len(expected) > 60
    counter = BigramCounter(capacity, chunk=chunk)
    for document in documents:
        counter.add(document)
        assert len(counter._keys) <= capacity
    found = counter.counts(keys_of(expected))
    true = np.array(list(expected.values()))
    assert 0 < counter.error <= counter.pairs / (capacity + 1)
    assert (found <= true).all()
    assert (true <= found + counter.error).all()


def test_memory_is_bounded_however_much_is_counted():
    capacity, chunk = 1 << 14, 1 << 13
    counter = BigramCounter(capacity, chunk=chunk)
    tracemalloc.start()
    try:
        for seed in range(40):  # 80,000 pairs, nearly all different
            counter.add(draws(2000, 1 << 20, seed))
        assert counter.error > 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # What the class promises, and a document with its draws: 64 bytes for each of 2,000 tokens.
    assert peak <= 4 * 16 * (capacity + chunk) + 64 * 2000


def test_tables_are_saved_and_read(tmp_path):
    counter = BigramCounter(10, chunk=50)
    counter.add(draws(500, 9))
    counter.save(tmp_path / "counts.npz")
    again = BigramCounter.load(tmp_path / "counts.npz")
    keys = keys_of([(a, b) for a in range(9) for b in range(9)])
    assert again.counts(keys).tolist() == counter.counts(keys).tolist()
    assert (again.error, again.pairs, again.capacity) == (counter.error, counter.pairs, 10)
    (tmp_path / "other").write_text("text")
    (tmp_path / "cut").write_bytes((tmp_path / "counts.npz").read_bytes()[:-30])
    np.savez(tmp_path / "foreign.npz", keys=np.zeros(1))
    for name in ("other", "cut", "foreign.npz"):
        with pytest.raises(ValueError, match=f"{name} is no table of bigram counts, or a damaged one"):
            BigramCounter.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        BigramCounter.load(tmp_path / "absent")
    assert not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(ValueError, match="capacity is 0"):
        BigramCounter(0)


# Hits


def by_definition(tokens, counts, threshold):
    """Section 10 of the definition, as a loop: distances of hits, 0 elsewhere."""
    seen, found = {}, []
    for i in range(1, len(tokens)):
        pair = (tokens[i - 1], tokens[i])
        hit = pair in seen and (threshold is None or counts[pair] <= threshold)
        found.append(i - seen[pair] if hit else 0)
        seen[pair] = i
    return found


def test_distances_by_hand():
    #                  pairs: ab bc ca ab bb bb bc
    assert repeat_distances(np.array([1, 2, 3, 1, 2, 2, 2, 3])).tolist() == [0, 0, 0, 3, 0, 1, 5]
    assert repeat_distances(np.array([4, 4, 4, 4])).tolist() == [0, 1, 1]
    assert repeat_distances(np.array([1, 2])).tolist() == [0]
    assert repeat_distances(np.array([1])).tolist() == []


def test_zoology_by_hand():
    # Token i = 1..5 with loss 1, 2, 4, 8, 16; the pair of tokens 3 and 5 repeats, the second time too common.
    loss = HitLoss("zoology")
    loss.add(-np.array([1.0, 2, 4, 8, 16]), np.array([0, 0, 2, 0, 4]), np.array([9, 9, 1250, 9, 1251]), window=6)
    assert loss.slices["all"] == Slice(5, 31.0)
    assert loss.slices["hits"] == Slice(1, 4.0)
    assert loss.slices["other"] == Slice(4, 27.0)
    assert loss.slices["distance 2^1"] == Slice(1, 4.0)
    assert "distance 2^2" not in loss.slices
    assert loss.slices["count 10^3"] == Slice(2, 20.0)
    assert loss.slices["hits"].perplexity == pytest.approx(math.exp(4))


def test_jrt_by_hand():
    # The second half of a window of 6 is tokens 3, 4, 5; no count is too common.
    loss = HitLoss("jrt")
    loss.add(-np.array([1.0, 2, 4, 8, 16]), np.array([0, 1, 2, 0, 4]), np.array([0, 1, 0, 5, 10**6]), window=6)
    assert loss.slices["all"] == Slice(3, 28.0)
    assert loss.slices["hits"] == Slice(2, 20.0)
    assert loss.slices["other"] == Slice(1, 8.0)
    assert loss.slices["distance 2^1"] == Slice(1, 4.0)
    assert loss.slices["distance 2^2"] == Slice(1, 16.0)
    assert loss.slices["count 0"] == Slice(1, 4.0)
    assert loss.slices["count 10^6"] == Slice(1, 16.0)
    # A short context has no second half.
    loss.add(-np.array([1.0]), np.array([0]), np.array([0]), window=6)
    assert loss.slices["all"].tokens == 3


@pytest.mark.parametrize("threshold", [0, 3, 1250])
def test_hits_are_those_of_the_definition(threshold):
    training = [draws(400, 8, seed) for seed in range(3)]
    counts = true_counts(training)
    counter = BigramCounter()
    for document in training:
        counter.add(document)
    loss = HitLoss("zoology", threshold)
    hits = collections.Counter()
    for seed in range(10, 14):
        tokens = draws(60, 8, seed)
        log_probs = -draws(59, 100, seed).astype(float)
        loss.add(log_probs, repeat_distances(tokens), counter.counts(pair_keys(tokens)), window=60)
        expected = by_definition(tokens.tolist(), counts, threshold)
        for distance, value in zip(expected, log_probs, strict=True):
            hits["tokens"] += distance > 0
            hits["nats"] -= value if distance else 0
            hits[f"distance 2^{distance.bit_length() - 1}"] += distance > 0
    assert loss.slices["hits"] == (hits["tokens"], hits["nats"])
    distances = {name: part.tokens for name, part in loss.slices.items() if name.startswith("distance")}
    assert distances == {name: number for name, number in hits.items() if name.startswith("distance") and number}
    assert loss.slices["all"].tokens == 4 * 59
    assert loss.slices["hits"].tokens + loss.slices["other"].tokens == 4 * 59


def test_slices_without_tokens():
    assert Slice().perplexity is None
    assert Slice(1, 1e6).perplexity == math.inf
    loss = HitLoss()
    loss.add(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64), window=4)
    assert loss.slices == {"all": Slice(), "hits": Slice(), "other": Slice()}


def test_counts_at_the_edges_of_decades():
    loss = HitLoss("jrt")
    counts = np.array([1, 9, 10, 99, 100, 999, 1000])
    loss.add(-np.ones(7), np.ones(7, np.int64), counts, window=2)
    assert {name: part.tokens for name, part in loss.slices.items() if name.startswith("count")} == {
        "count 10^0": 2, "count 10^1": 2, "count 10^2": 2, "count 10^3": 1,
    }  # fmt: skip


def test_gap_share_by_hand():
    better = {"all": Slice(100, 200.0), "hits": Slice(10, 10.0)}
    worse = {"all": Slice(100, 230.0), "hits": Slice(10, 34.0)}
    # 10 % of tokens; 2.4 nats apart on hits, 0.3 overall: 0.1 * 2.4 / 0.3.
    assert gap_share(better, worse) == pytest.approx(0.8)
    assert gap_share(better, better) is None
    with pytest.raises(ValueError, match="100 and 99 tokens of 'all'"):
        gap_share(better, {**worse, "all": Slice(99, 1.0)})


def test_names():
    with pytest.raises(ValueError, match=r"unknown definition 'zoo'"):
        HitLoss("zoo")
    names = ["count 10^2", "count 0", "count 10^0", "distance 2^10", "distance 2^2", "other", "all", "hits"]
    assert slice_order(names) == [
        "all", "hits", "other", "distance 2^2", "distance 2^10", "count 0", "count 10^0", "count 10^2",
    ]  # fmt: skip
