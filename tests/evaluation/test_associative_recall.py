"""AR-hit perplexity of a model whose probabilities are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from seqmodels import cli
from seqmodels.evaluation import associative_recall, run_model
from seqmodels.evaluation.associative_recall import count_bigrams, evaluate_hits
from seqmodels.evaluation.text_model import TokenScores
from seqmodels.models import LanguageModel, ModelConfig, save_model
from seqmodels.tasks.corpus import CorpusError, Document


class Bytes:
    """Loss of a byte: its value / 100 nats."""

    name, identity, front, prefix_token, max_length, batch_size = "bytes", "b", [0], 0, None, 8

    def encode(self, text):
        return list(text.encode())

    def log_likelihoods(self, pairs):
        return [
            TokenScores(-np.array(rest, float) / 100, np.zeros(len(rest), bool)) for context, rest in pairs
        ]  # fmt: skip


def documents(*texts):
    return [Document(str(index), text.encode()) for index, text in enumerate(texts)]


def test_perplexity_of_hits():
    counter = count_bigrams(Bytes(), documents("ab" * 700), capacity=100)  # "ab" 700 times, "ba" 699
    score = evaluate_hits(Bytes(), documents("abab"), counter, window=16)
    # Tokens: NUL a b a b; only the second "ab" repeats.
    zoology = score.slices["zoology"]
    assert zoology["all"].tokens == 4
    assert zoology["all"].nats == pytest.approx((97 + 98 + 97 + 98) / 100)
    assert zoology["hits"].tokens == 1
    assert zoology["hits"].perplexity == pytest.approx(np.exp(0.98))
    # Counted often enough, it is no hit any more; JRT's definition has no threshold but wants the second half.
    common = count_bigrams(Bytes(), documents("ab" * 1251), capacity=100)
    score = evaluate_hits(Bytes(), documents("abab"), common, window=5)
    assert score.slices["zoology"]["hits"].tokens == 0
    assert score.slices["jrt"]["hits"].tokens == 1
    assert score.slices["jrt"]["all"].tokens == 3  # tokens 2, 3, 4


def test_contexts_end_at_windows_and_documents():
    counter = count_bigrams(Bytes(), documents("ab"), capacity=100)
    # NUL a b a | b a b: "ba" and "ab" of the second window are new to it.
    score = evaluate_hits(Bytes(), documents("ababab", "ab"), counter, window=4)
    assert score.contexts == 3
    assert score.slices["zoology"]["all"].tokens == 3 + 2 + 2
    assert score.slices["zoology"]["hits"].tokens == 0
    assert evaluate_hits(Bytes(), documents("ababab", "ab"), counter, window=4, contexts=1).contexts == 1
    # A rest of a single token has no pair.
    assert evaluate_hits(Bytes(), documents("abab"), counter, window=4).contexts == 1


def test_long_documents_are_read_in_parts(monkeypatch):
    texts = ["to be or\nnot to be\n" * 9, "ÄÖÜ€🦊" * 20, "", "x"]
    expected = count_bigrams(Bytes(), documents(*texts), capacity=1000)
    score = evaluate_hits(Bytes(), documents(*texts), expected, window=16)
    for part in (4, 5, 6, 7, 8, 50):
        monkeypatch.setattr(associative_recall, "PART", part)
        pieces = list(associative_recall._texts(texts[1].encode()))
        assert b"".join(pieces) == texts[1].encode()
        assert max(map(len, pieces)) <= part
        assert "".join(piece.decode() for piece in pieces) == texts[1]  # no character is cut
        found = count_bigrams(Bytes(), documents(*texts), capacity=1000)
        assert found.pairs == expected.pairs
        assert (found.counts(expected._keys) == expected._counts).all()
        assert evaluate_hits(Bytes(), documents(*texts), found, window=16) == score
    # A tokenizer whose tokens are lines sees whole ones wherever they fit.
    assert all(piece.endswith(b"\n") for piece in associative_recall._texts(texts[0].encode()))


def test_counts_of_another_tokenizer_are_refused():
    class Words(Bytes):
        def encode(self, text):
            return [len(word) for word in text.split()]

    with pytest.raises(ValueError, match="the counts are of another tokenizer"):
        evaluate_hits(Words(), documents("a b"), count_bigrams(Bytes(), documents("ab"), capacity=100))


def test_refusals():
    counter = count_bigrams(Bytes(), documents("ab"), capacity=100)
    with pytest.raises(ValueError, match="window is 3"):
        evaluate_hits(Bytes(), documents("ab"), counter, window=3)
    with pytest.raises(CorpusError, match="nothing to score"):
        evaluate_hits(Bytes(), [], counter)
    short = Bytes()
    short.max_length = 8
    with pytest.raises(ValueError, match="bytes reads 8 tokens"):
        evaluate_hits(short, documents("ab"), counter, window=9)


def test_the_command(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=256, d_model=8, pattern="linear_attention", layers={"linear_attention": {"num_heads": 2}}
    )
    model = save_model(LanguageModel(config), tmp_path / "model")
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question " * 3)
    runner = CliRunner(env={"COLUMNS": "200"})

    def run(*more, status=0):
        command = ["ar-hits", str(model), "--data", str(tmp_path / "text.txt"), *map(str, more)]
        result = runner.invoke(cli.app, command)
        assert result.exit_code == status, result.output
        return result

    train, table = ("--train", tmp_path / "text.txt"), ("--table", tmp_path / "counts.npz")
    output = run("--out", tmp_path / "a.json", *train, *table, "--window", 64).output
    assert "are exact" in output
    assert (tmp_path / "counts.npz").exists()
    result = json.loads((tmp_path / "a.json").read_text())
    slices = result["slices"]["zoology"]
    assert slices["all"]["tokens"] == 3 * 41 - 1  # 124 tokens in two windows, whose first is not predicted
    assert slices["hits"]["tokens"] + slices["other"]["tokens"] == slices["all"]["tokens"]
    output = run("--out", tmp_path / "b.json", *table, "--window", 64, "--beside", tmp_path / "a.json").output
    assert json.loads((tmp_path / "b.json").read_text()) == result
    kept = (tmp_path / "a.json").read_bytes()
    assert "exists; give another --out" in str(run("--out", tmp_path / "a.json", *table, status=1).exception)
    assert (tmp_path / "a.json").read_bytes() == kept
    assert "give --train" in str(run("--out", tmp_path / "c.json", status=1).exception)
    (tmp_path / "other.txt").write_text("other text")
    foreign = run("--out", tmp_path / "c.json", "--train", tmp_path / "other.txt", *table, status=1)
    assert "the counts are of another corpus" in str(foreign.exception)
    other = run("--out", tmp_path / "c.json", *table, "--window", 32, "--beside", tmp_path / "a.json", status=1)
    assert "was scored on other text" in str(other.exception)
    assert (tmp_path / "c.json").exists()  # what was computed is kept, and shown
    assert "zoology" in other.output
    for content, message in (
        (None, "does not exist; expected a result"),
        ("{", "no result of"),
        ("{}", "no result of"),
    ):
        (tmp_path / "wrong.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "wrong.json").write_text(content)
        wrong = run("--out", tmp_path / "d.json", *table, "--beside", tmp_path / "wrong.json", status=1)
        assert message in str(wrong.exception)
    early = run("--out", tmp_path / "d.json", *train, "--table", tmp_path / "late.npz", "--window", 10**9, status=0)
    assert "wrote" in early.output  # our models read any length
    monkeypatch.setattr(
        run_model.RunTextModel, "max_length", property(lambda self: 100, lambda self, value: None), False
    )
    (tmp_path / "d.json").unlink()
    long = run("--out", tmp_path / "d.json", *train, "--table", tmp_path / "long.npz", "--window", 101, status=1)
    assert "window is 101" in str(long.exception)
    assert not (tmp_path / "long.npz").exists()  # found out before anything is counted
    assert not (tmp_path / "d.json").exists()
    run("--out", tmp_path / "new" / "d.json", *train, "--table", tmp_path / "too" / "t.npz", "--window", 64)
    assert (tmp_path / "too" / "t.npz").exists()
