"""Packed rows: every token once an epoch, boundaries kept, and a batch for every row number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqmodels.tasks.corpus import CorpusError, Document
from seqmodels.tasks.text import PackedText, split_documents
from seqmodels.tasks.token_cache import build_token_cache
from seqmodels.tasks.tokenizer import ByteTokenizer


@pytest.fixture
def cache(tmp_path):
    """Documents whose bytes tell where they come from: document d is d+1, repeated."""
    lengths = [1, 70, 2, 33, 5, 1, 128, 9]
    documents = [Document(f"d{index}", bytes([index + 1]) * length) for index, length in enumerate(lengths)]
    return build_token_cache(documents, ByteTokenizer(), tmp_path)


def rows(text: PackedText, first: int, count: int):
    batch = text.batch(first, count)
    return [(batch.tokens[row].tolist(), batch.targets[row].tolist(), batch.lengths[row]) for row in range(count)]


def test_tokens_are_inputs_and_targets_of_one_document(cache):
    text = PackedText(cache, np.arange(8), 16, seed=0)
    assert text.total_tokens == 249 + 8
    for tokens, targets, lengths in rows(text, 0, text.rows_per_epoch):
        assert sum(lengths) == 16
        column = 0
        for length in lengths:
            piece, ahead = tokens[column : column + length], targets[column : column + length]
            assert ahead[:-1] == piece[1:]
            assert len(set(piece) - {0}) <= 1  # one document's bytes
            assert 0 not in piece[1:]  # a separator only begins a document
            assert ahead[-1] == 0 or ahead[-1] == max(ahead)
            column += length


def test_an_epoch_reads_every_token_at_most_once_and_drops_less_than_a_row(cache):
    text = PackedText(cache, np.arange(8), 16, seed=0)
    counts = np.zeros(256, dtype=int)
    for tokens, _, _ in rows(text, 0, text.rows_per_epoch):
        counts += np.bincount(tokens, minlength=256)
    whole = np.bincount(cache.tokens[:-1], minlength=256)
    assert (counts <= whole).all()
    assert 0 <= whole.sum() - counts.sum() < 16


def test_rows_depend_on_their_number_only(cache):
    text = PackedText(cache, np.arange(8), 16, seed=0)
    straight = rows(text, 0, 40)  # more than two epochs
    again = PackedText(cache, np.arange(8), 16, seed=0)
    assert [rows(again, number, 1)[0] for number in reversed(range(40))] == straight[::-1]


def test_epochs_and_seeds_are_shuffled_differently(cache):
    text = PackedText(cache, np.arange(8), 16, seed=0)
    count = text.rows_per_epoch
    assert rows(text, 0, count) != rows(text, count, count)
    assert rows(text, 0, count) != rows(PackedText(cache, np.arange(8), 16, seed=1), 0, count)


def test_the_layout_is_the_documents(cache):
    batch = PackedText(cache, np.arange(8), 16, seed=0).batch(3, 4)
    layout = batch.layout()
    assert layout.valid.all()
    begins = layout.position == 0
    column = torch.arange(16).expand(4, 16)
    assert torch.equal(begins & (column > 0), (batch.tokens == 0) & (column > 0))


def test_capacity_holds_for_every_batch_and_is_reached_by_the_worst(cache, tmp_path):
    text = PackedText(cache, np.arange(8), 16, seed=0)
    capacity = text.document_capacity(4)
    most = max(sum(len(lengths) for lengths in text.batch(first, 4).lengths) for first in range(400))
    assert most <= capacity
    batch = text.batch(0, 4)
    assert batch.layout(capacity).num_documents == capacity
    short = [Document(str(index), b"a") for index in range(100)]
    tight = PackedText(build_token_cache(short, ByteTokenizer(), tmp_path / "short"), np.arange(100), 16, seed=0)
    assert tight.document_capacity(2) >= 16 == sum(len(lengths) for lengths in tight.batch(0, 2).lengths)


def test_a_subset_of_documents_is_all_that_is_read(cache):
    text = PackedText(cache, np.array([1, 6]), 16, seed=0)
    seen = {token for tokens, targets, _ in rows(text, 0, 30) for token in tokens + targets}
    assert seen == {0, 2, 7}


def test_the_split_is_by_file_and_stable(cache):
    train, held_out = split_documents(cache, 0.25, seed=0)
    assert sorted([*train, *held_out]) == list(range(8))
    assert len(held_out) == 2
    assert [list(part) for part in split_documents(cache, 0.25, seed=0)] == [list(train), list(held_out)]
    assert len({tuple(split_documents(cache, 0.25, seed=seed)[1]) for seed in range(10)}) > 3
    assert len(split_documents(cache, 0.01, seed=0)[1]) == 1
    assert len(split_documents(cache, 0.99, seed=0)[0]) == 1
    assert len(split_documents(cache, 0.0, seed=0)[1]) == 0


def test_too_little_text_is_refused(cache):
    with pytest.raises(CorpusError, match="the corpus has 2 tokens in 1 documents, less than one window of 16"):
        PackedText(cache, np.array([0]), 16, seed=0)
