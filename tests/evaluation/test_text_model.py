"""Models behind one protocol: batches of unequal texts equal one at a time, with states, windows and prefixes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from seqmodels.evaluation import run_model
from seqmodels.evaluation.real_text import evaluate_recall
from seqmodels.evaluation.records import Records
from seqmodels.evaluation.text_model import by_length, open_text_model, scores_of, shortened
from seqmodels.layout import Layout
from seqmodels.models import LanguageModel, ModelConfig, save_model

PROMPTS = ["a", "the quick brown fox", "lazy dogs, " * 9, "x" * 33, "Ünïcode"]
LAYERS = {
    "linear_attention": {"num_heads": 2},
    "attention": {"num_heads": 2},
    "near": {"layer": "attention", "num_heads": 2, "window": 8},
    "prefix_linear_attention": {"num_heads": 2, "feature_dim": 4},
}


def saved(folder, pattern="gated_conv linear_attention near attention mamba3", **options):
    torch.manual_seed(0)
    layers = {"mamba3": {"d_state": 8, "head_dim": 8}, **LAYERS}
    used = {name: layers[name] for name in pattern.split() if name in layers}
    config = ModelConfig(vocab_size=256, d_model=16, pattern=pattern, layers=used, **options)
    model = LanguageModel(config, dtype=torch.float64)
    with torch.no_grad():  # the logits of a new model are nearly equal: make its choices clear
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return save_model(model, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("run") / "model")


def pairs_of(model):
    texts = [model.encode(text) for text in PROMPTS]
    return [([model.prefix_token, *text], rest) for text, rest in zip(texts, texts[::-1], strict=True)]


def test_generation_does_not_depend_on_the_batch(run):
    alone, together = open_text_model(str(run), batch_size=1), open_text_model(str(run), batch_size=5)
    options = {"max_new_tokens": 12, "window": 40}
    expected = [alone.generate([prompt], **options)[0] for prompt in PROMPTS]
    assert together.generate(PROMPTS, **options) == expected
    assert len(set(expected)) > 1


def test_a_long_prompt_is_read_from_its_end(run):
    model = open_text_model(str(run))
    # window 20 and 12 new tokens: the separator and 7 bytes.
    options = {"max_new_tokens": 12, "window": 20}
    assert model.generate(["0123456789"], **options) == model.generate(["3456789"], max_new_tokens=12)
    assert model.generate(["0123456789"], **options) != model.generate(["0123456789"], max_new_tokens=12)
    with pytest.raises(ValueError, match="window=12 leaves no token of the prompt"):
        model.generate(["a"], max_new_tokens=12, window=12)
    with pytest.raises(ValueError, match="max_prompt_tokens is 1"):
        model.generate(["a"], max_new_tokens=12, window=13)


@pytest.mark.parametrize("piece", [2048, 16])
def test_log_likelihoods_are_those_of_each_text_alone(run, piece, monkeypatch):
    monkeypatch.setattr(run_model, "PIECE", piece)
    monkeypatch.setattr(run_model, "LOGITS", 5 * 256)
    model = open_text_model(str(run), batch_size=3)
    pairs = pairs_of(model)
    for (context, rest), scores in zip(pairs, model.log_likelihoods(pairs), strict=True):
        text = torch.tensor([[*context, *rest]])
        with torch.no_grad():
            logits = model.model(text[:, :-1]).logits[0, len(context) - 1 :]
        expected = logits.log_softmax(1).gather(1, text[0, len(context) :, None])[:, 0]
        np.testing.assert_allclose(scores.log_probs, expected, rtol=1e-9)
        np.testing.assert_array_equal(scores.greedy, logits.argmax(1) == text[0, len(context) :])
        assert scores.total == pytest.approx(float(expected.sum()), rel=1e-9)


def test_meta_tokens_stand_before_every_text_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_model, "PIECE", 16)
    model = open_text_model(str(saved(tmp_path / "m", "linear_attention near", meta_tokens=3)), batch_size=3)
    pairs = pairs_of(model)
    for (context, rest), scores in zip(pairs, model.log_likelihoods(pairs), strict=True):
        text = torch.tensor([[*context, *rest]])
        with torch.no_grad():
            logits = model.model(text[:, :-1]).logits[0, len(context) - 1 :]
        expected = logits.log_softmax(1).gather(1, text[0, len(context) :, None])[:, 0]
        np.testing.assert_allclose(scores.log_probs, expected, rtol=1e-9)
    alone = [model.generate([prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=8) == alone


def test_a_prefix_model_reads_contexts_in_both_directions(tmp_path, monkeypatch):
    monkeypatch.setattr(run_model, "PIECE", 4)  # a prefix goes in whole all the same
    folder = saved(tmp_path / "m", "prefix_linear_attention near", objective="prefix", prefix_length=10)
    model = open_text_model(str(folder), batch_size=5)
    pairs = pairs_of(model)
    for (context, rest), scores in zip(pairs, model.log_likelihoods(pairs), strict=True):
        text = torch.tensor([[*context, *rest]])
        layout = Layout.full(1, text.shape[1] - 1, prefix_lengths=[min(10, len(context))])
        with torch.no_grad():
            logits = model.model(text[:, :-1], layout=layout).logits[0, len(context) - 1 :]
        expected = logits.log_softmax(1).gather(1, text[0, len(context) :, None])[:, 0]
        np.testing.assert_allclose(scores.log_probs, expected, rtol=1e-9)


def test_a_greedy_continuation_is_scored_as_greedy(run):
    model = open_text_model(str(run))
    (text,) = model.generate(["some text"], max_new_tokens=6)
    context = [model.prefix_token, *model.encode("some text")]
    tokens = model.generator.decoder.generate([context], max_new_tokens=6)[0]
    (scores,) = model.log_likelihoods([(context, tokens)])
    assert scores.greedy.all()
    other = [*tokens[:3], (tokens[3] + 1) % 256, *tokens[4:]]
    assert not model.log_likelihoods([(context, other)])[0].greedy[3]
    assert isinstance(text, str)


def test_pairs_without_tokens_are_refused(run):
    model = open_text_model(str(run))
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one of each"):
            model.log_likelihoods([pair])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_of_logits(dtype):
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 3.0, 2.0], [-1e4, 0.0, -1e4]], dtype=dtype)
    log_probs, greedy = scores_of(logits, torch.tensor([0, 1, 1, 1]))
    expected = [-math.log(3), -math.log(3), 3 - math.log(math.e + math.e**2 + math.e**3), 0.0]
    np.testing.assert_allclose(log_probs, expected, atol=1e-15 if dtype == torch.float64 else 1e-6)
    assert log_probs.dtype == np.float64
    assert greedy.tolist() == [True, False, True, True]  # of equal logits the lowest id is the most likely
    for array in scores_of(logits[:0], torch.zeros(0, dtype=torch.int64)):
        assert array.shape == (0,)


def test_names(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="write hf:"):
        open_text_model(str(tmp_path))
    for name, what in ((tmp_path / "none", "is no folder"), (run.parent, "holds no config.yaml")):
        with pytest.raises(ValueError, match=f"{what}; expected a run folder, .* or hf:NAME"):
            open_text_model(str(name))
    with pytest.raises(ValueError, match="batch_size is 0"):
        open_text_model(str(run), batch_size=0)
    assert open_text_model(str(run)).identity != open_text_model(str(run), dtype="float32").identity


def test_batches_of_equal_length():
    assert list(by_length([3, 1, 3, 2, 1], 2)) == [[0, 2], [3, 1], [4]]
    assert list(by_length([3, 1, 3, 2, 1, 1], 2, equal=True)) == [[0, 2], [3], [1, 4], [5]]
    assert list(by_length([], 2)) == []


# Answers on disk


class Echo:
    """Says the first word of a prompt's last line; counts what it is asked."""

    name, identity, front, prefix_token, max_length, batch_size = "echo", "e1", [], None, None, 1

    def __init__(self) -> None:
        self.asked = []

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode()

    def generate(self, prompts, *, max_new_tokens, stop=(), window=None):
        self.asked += prompts
        return [prompt.split()[0] for prompt in prompts]


EXAMPLES = [{"text": f"{word} is here", "key": "which", "value": value} for word, value in
            (("red", "Red"), ("blue", "red"), ("green", "3"), ("grey", "rey"))]  # fmt: skip


def test_recall_is_the_share_of_answers_found(tmp_path):
    score = evaluate_recall(Echo(), "fda", EXAMPLES, tmp_path, limit=100)
    assert (score.correct, score.total, score.dropped) == (2, 3, 1)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.standard_error == pytest.approx((2 / 3 * 1 / 3 / 3) ** 0.5)
    uncut = evaluate_recall(Echo(), "fda", EXAMPLES, tmp_path, limit=None)
    assert (uncut.correct, uncut.total, uncut.dropped) == (2, 4, 0)


def test_prompts_beyond_the_window_are_counted(tmp_path):
    # "red is here. Which:" has 19 bytes, "green is here. Which:" 21; the window leaves 20 beside 48 of the answer.
    score = evaluate_recall(Echo(), "fda", EXAMPLES, tmp_path, limit=None, window=68)
    assert score.shortened == 1
    short = Echo()
    short.max_length, short.front = 66, [0]  # a model's own length, and what stands in front, count too
    assert shortened(short, ["x" * 17, "x" * 18], 2048, 48) == 1
    assert shortened(Echo(), ["x" * 10**4], None, 48) == 0


def test_a_killed_run_goes_on_and_loses_no_finished_answer(tmp_path):
    whole = evaluate_recall(Echo(), "fda", EXAMPLES, tmp_path, limit=None)
    content = whole.path.read_bytes()
    lines = content.splitlines(keepends=True)
    # Killed in the middle of the fourth line (a header and two answers are whole).
    whole.path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    model = Echo()
    assert evaluate_recall(model, "fda", EXAMPLES, tmp_path, limit=None) == whole
    assert len(model.asked) == 2
    assert whole.path.read_bytes() == content
    assert evaluate_recall(model, "fda", EXAMPLES, tmp_path, limit=None) == whole
    assert len(model.asked) == 2


def test_a_few_examples_first_and_all_of_them_later(tmp_path):
    few = evaluate_recall(Echo(), "fda", EXAMPLES[:2], tmp_path, limit=None)
    assert (few.correct, few.total) == (1, 2)
    model, steps = Echo(), []
    whole = evaluate_recall(model, "fda", EXAMPLES, tmp_path, limit=None, progress=lambda *done: steps.append(done))
    assert (whole.correct, whole.total) == (2, 4)
    assert len(model.asked) == 2
    assert (steps[0], steps[-1]) == ((2, 4), (4, 4))
    assert evaluate_recall(Echo(), "fda", EXAMPLES[:2], tmp_path, limit=None) == few


def test_answers_of_something_else_are_refused_and_stay(tmp_path):
    score = evaluate_recall(Echo(), "fda", EXAMPLES, tmp_path, limit=None)
    content = score.path.read_bytes()
    other = Echo()
    other.identity = "e2"
    with pytest.raises(ValueError, match="something else: model is 'e1' there, 'e2' here"):
        evaluate_recall(other, "fda", EXAMPLES, tmp_path, limit=None)
    with pytest.raises(ValueError, match="answers another question at example 1"):
        evaluate_recall(Echo(), "fda", [EXAMPLES[0], *EXAMPLES[2:]], tmp_path, limit=None)
    assert score.path.read_bytes() == content
    with pytest.raises(ValueError, match="none of 1 examples is left"):
        evaluate_recall(Echo(), "fda", EXAMPLES[2:3], tmp_path, limit=100)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a file of this evaluation"):
        Records(path, {})
    assert path.read_text() == "hello"
    path.write_text('{"key": "1"}\n')
    with pytest.raises(ValueError, match="has no header"):
        Records(path, {})
    path.write_text('{"header": 1}\n{"key": "1"}\n')
    with pytest.raises(ValueError, match="1 is no header"):
        Records(path, {})
    for line, message in (("{", "2 is not JSON"), ("[]", "2 is list"), ("{}", "2 has no key")):
        path.write_text('{"header": {}}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            Records(path, {})
    path.write_text('{"header"')  # killed in the first line: nothing was finished
    assert Records(path, {"a": (1, 2)}).items == {}
    Records(path, {"a": 3}).add("x", value=1)  # nor is anything behind a header alone
    assert Records(path, {"a": 3}).items == {"x": {"key": "x", "value": 1}}
    with pytest.raises(ValueError, match="a is 3 there, 4 here"):
        Records(path, {"a": 4})
