"""Scoring documents in lanes of windows gives each document's own code length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from seqmodels import Layout
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.tasks.corpus import Document
from seqmodels.tasks.evaluation import score_documents
from seqmodels.tasks.shuffle import raw_draws
from seqmodels.tasks.token_cache import build_token_cache
from seqmodels.tasks.tokenizer import ByteTokenizer

LENGTHS = [3, 50, 17, 1, 128, 64, 31]


@pytest.fixture
def cache(tmp_path):
    documents = [Document(str(i), raw_draws(i, count=n).astype(np.uint8).tobytes()) for i, n in enumerate(LENGTHS)]
    return build_token_cache(documents, ByteTokenizer(), tmp_path)


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = {
        "linear_attention": {"num_heads": 2},
        "attention": {"num_heads": 2},
        "near": {"layer": "attention", "num_heads": 2, "window": 8},
    }
    pattern = "gated_conv linear_attention attention near"
    return LanguageModel(ModelConfig(vocab_size=256, d_model=16, pattern=pattern, layers=layers), dtype=torch.float64)


def alone(model, cache, documents):
    """Each document whole, by itself, from the logits."""
    nats = 0.0
    for index in documents:
        tokens = torch.from_numpy(cache.document(index).astype(np.int64))
        logits = model(tokens[None, :-1]).logits[0]
        nats -= float(logits.log_softmax(-1).gather(1, tokens[1:, None]).sum())
    return nats


@pytest.mark.parametrize(("window", "batch_size"), [(16, 3), (7, 2), (1000, 7), (1, 4), (64, 1)])
def test_windows_and_lanes_change_nothing(model, cache, window, batch_size):
    with torch.no_grad():
        expected = alone(model, cache, range(7))
    score = score_documents(model, cache, np.arange(7), window=window, batch_size=batch_size)
    assert score.nats == pytest.approx(expected, rel=1e-9)
    assert score.tokens == sum(LENGTHS) + 7
    assert score.text_bytes == sum(LENGTHS)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / sum(LENGTHS), rel=1e-9)
    assert score.perplexity == pytest.approx(math.exp(expected / (sum(LENGTHS) + 7)), rel=1e-9)


def test_a_part_of_the_documents_and_progress(model, cache):
    seen = []
    score = score_documents(
        model, cache, np.array([1, 4]), window=32, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    with torch.no_grad():
        assert score.nats == pytest.approx(alone(model, cache, [1, 4]), rel=1e-9)
    assert seen[-1] == (180, 180)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(("window", "batch_size"), [(16, 3), (12, 7), (1000, 2)])
def test_prefix_models_are_scored_behind_their_prefix(cache, window, batch_size):
    torch.manual_seed(0)
    layers = {"prefix_linear_attention": {"num_heads": 2, "feature_dim": 4}}
    config = ModelConfig(
        vocab_size=256, d_model=16, pattern="gated_conv prefix_linear_attention", layers=layers,
        objective="prefix", prefix_length=12,
    )  # fmt: skip
    model = LanguageModel(config, dtype=torch.float64)
    nats, count = 0.0, 0
    with torch.no_grad():
        for index in range(7):
            tokens = torch.from_numpy(cache.document(index).astype(np.int64))
            layout = Layout.full(1, len(tokens) - 1, prefix_lengths=[12])
            logits = model(tokens[None, :-1], layout=layout).logits[0, 12:]
            nats -= float(logits.log_softmax(-1).gather(1, tokens[13:, None]).sum())
            count += len(tokens[13:])
    score = score_documents(model, cache, np.arange(7), window=window, batch_size=batch_size)
    assert score.nats == pytest.approx(nats, rel=1e-9)
    assert score.tokens == count
    assert score.text_bytes == round(sum(LENGTHS) * count / (sum(LENGTHS) + 7))
    with pytest.raises(ValueError, match="window=8 does not hold the model's prefix_length=12"):
        score_documents(model, cache, np.arange(7), window=8)
    with pytest.raises(ValueError, match="no document is longer than the model's prefix_length=12"):
        score_documents(model, cache, np.array([0, 3]), window=16)
