"""Rows of several lengths in one run, and lanes that go on: every token once, in an order that a step decides."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_cases import tiny_data

from seqmodels.configuration import ConfigError
from seqmodels.tasks.corpus import CorpusError, Document
from seqmodels.tasks.text import DocumentStream, PackedText
from seqmodels.tasks.token_cache import TokenCache, build_token_cache
from seqmodels.tasks.tokenizer import ByteTokenizer
from seqmodels.training.config import TrainConfig, convert_train_config
from seqmodels.training.feed import micro_batch_rows
from seqmodels.training.reading import Span, TextReader, reading_plan

MODEL = {"vocab_size": 256, "d_model": 8, "pattern": "swiglu"}
STAGES = [
    {"name": "short", "share": 0.25},
    {"name": "long", "share": 0.25, "sequence_length": 64},
    {"name": "lanes", "share": 0.25, "sequence_length": 16, "carry_state": True},
    {"name": "windows", "share": 0.25, "backpropagation_windows": 2, "carry_state": True},
]


def config(folder: Path = Path("unused"), stages: Any = STAGES, **changes: Any) -> TrainConfig:
    curriculum = None if stages is None else {"stages": stages}
    values = {"model": MODEL, "curriculum": curriculum, "steps": 12, **changes}
    return convert_train_config(tiny_data(folder, **values))


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    """700 tokens: a step reads 128 of them, a run of 12 steps more than two epochs."""
    rng = np.random.default_rng(0)
    sizes = [1, 70, 2, 33, 5, 1, 128, 9, 190, 251]
    texts = [rng.integers(1, 256, size, dtype=np.uint8).tobytes() for size in sizes]
    return build_token_cache([Document(str(i), text) for i, text in enumerate(texts)], ByteTokenizer(), tmp_path)


def reader(cache: TokenCache, made: TrainConfig) -> TextReader:
    data = PackedText(cache, np.arange(10), made.data.sequence_length, seed=made.seed)
    return TextReader(reading_plan(made), data)


def test_the_plan_keeps_the_tokens_of_a_step() -> None:
    spans = reading_plan(config())
    assert [(s.first, s.end, s.sequence_length, s.windows, s.rows, s.carry) for s in spans] == [
        (0, 3, 32, 1, 4, False), (3, 6, 64, 1, 2, False), (6, 9, 16, 1, 8, True), (9, 12, 32, 2, 2, True),
    ]  # fmt: skip
    assert {span.rows * span.row_length for span in spans} == {128}
    plain = reading_plan(config(stages=[{"name": name, "share": 0.5} for name in "ab"]))
    assert plain == reading_plan(config(stages=None)) == [Span(0, 12, 32, 1, 4, False, "the run")]


def test_stages_leave_no_token_out_and_read_none_twice(cache: TokenCache) -> None:
    """After each step, the tokens read are those of the stage's own stretch of the stream, all others untouched."""
    made = config()
    text = reader(cache, made)
    stream = text.data.stream
    for span in text.spans:
        rows = [text.batch(step, 0, span.rows) for step in range(span.first, span.end)]
        pairs = Counter()
        for batch in rows:
            pairs.update(zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True))
            assert all(sum(lengths) == span.row_length for lengths in batch.lengths)
        whole = stream.read([span.first * 128], (span.end - span.first) * 128)
        assert pairs == Counter(zip(whole.tokens[0].tolist(), whole.targets[0].tolist(), strict=True))


def test_lanes_are_contiguous(cache: TokenCache) -> None:
    text = reader(cache, config())
    for span in text.spans[2:]:
        steps = [text.batch(step, 0, span.rows) for step in range(span.first, span.end)]
        for lane in range(span.rows):
            tokens = np.concatenate([batch.tokens[lane] for batch in steps])
            start = span.first * 128 + lane * len(tokens)
            assert tokens.tolist() == text.data.stream.read([start], len(tokens)).tokens[0].tolist()
        assert [text.goes_on(step) for step in range(span.first, span.end)] == [False, True, True]
        for before, after in itertools.pairwise(steps):
            for lane in range(span.rows):  # a separator begins a document, and nothing else does
                assert after.inside[lane] == (int(after.tokens[lane, 0]) != 0)
                assert int(before.targets[lane, -1]) == int(after.tokens[lane, 0])


def test_rows_of_a_stage_without_lanes_are_shuffled(cache: TokenCache) -> None:
    text = reader(cache, config())
    found = [text._position(text.spans[1], step, row) for step in range(3, 6) for row in range(2)]
    assert sorted(found) == [384 + 64 * row for row in range(6)]
    assert found != sorted(found)


def test_a_run_without_stages_reads_as_before(cache: TokenCache) -> None:
    text = reader(cache, config(stages=None))
    for step in (0, 5, 11):
        ours, theirs = text.batch(step, 1, 2), text.data.batch(step * 4 + 1, 2)
        assert ours.tokens.equal(theirs.tokens)
        assert text.number(step) == step * 4


def test_any_stretch_of_the_stream_is_the_same_tokens(cache: TokenCache) -> None:
    stream = DocumentStream(cache, np.arange(10), seed=0)
    count = 3 * stream.total_tokens
    whole = stream.read([0], count)
    assert [sum(whole.lengths[0][10 * epoch : 10 * epoch + 10]) for epoch in range(3)] == [stream.total_tokens] * 3
    for size in (1, 7, 64, 1000):
        parts = [stream.read([start], size).tokens[0] for start in range(0, count, size)]
        assert np.concatenate(parts)[:count].tolist() == whole.tokens[0].tolist()
    begins = np.concatenate([[0], np.cumsum(whole.lengths[0])])
    assert [stream.read([start], 1).inside[0] for start in range(50)] == [start not in begins for start in range(50)]


def test_capacity_holds_wherever_rows_begin(cache: TokenCache) -> None:
    stream = DocumentStream(cache, np.arange(10), seed=0)
    for size in (3, 16, 64, 800, 2000):
        most = max(len(stream.read([start], size).lengths[0]) for start in range(0, 2200, 7))
        assert most <= stream.document_capacity(1, size) <= size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"name": "a", "share": 1.0, "sequence_length": 48}]},
         r"stages.0 \(a\): rows of sequence_length=48 x backpropagation_windows=1 tokens do not divide.*= 128 tokens"),
        ({"stages": None, "backpropagation_windows": 3}, "the run: rows of sequence_length=32 x .*=3 tokens do not"),
        ({"stages": [{"name": "a", "share": 1.0, "sequence_length": 128}], "accumulation": 2},
         "a step has 1 rows of 128 tokens, which accumulation=2 does not divide"),
    ],
)  # fmt: skip
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("key", ["carry_state", "backpropagation_windows"])
def test_a_prefix_model_goes_on_from_nothing(key: str) -> None:
    model = {"vocab_size": 257, "d_model": 8, "pattern": "prefix_linear_attention", "objective": "prefix"}
    model |= {"prefix_length": 8, "layers": {"prefix_linear_attention": {"num_heads": 2, "feature_dim": 4}}}
    changes: dict[str, Any] = {key: 2 if "windows" in key else True}
    with pytest.raises(ConfigError, match=f"the run: {key} is for causal models"):
        config(stages=None, model=model, **changes)
    with pytest.raises(ConfigError, match=r"prefix_length=8 leaves no next token.*sequence_length=8"):
        config(stages=[{"name": "a", "share": 1.0, "sequence_length": 8}], model=model)


def test_processes_that_cannot_share_a_stage_are_refused() -> None:
    made = config()
    with pytest.raises(ConfigError, match=r"stages.1 \(long\): a step has 2 rows of 64 tokens .*by 4 processes"):
        micro_batch_rows(made, reading_plan(made)[1], 4)


def test_a_text_shorter_than_a_row_is_refused(cache: TokenCache) -> None:
    made = config(batch_size=64, stages=[{"name": "a", "share": 1.0, "sequence_length": 1024}])
    with pytest.raises(CorpusError, match="less than one row of 1024"):
        reader(cache, made)
