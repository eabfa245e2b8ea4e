"""The heat map: what it asks, what it draws, what survives a kill."""

from __future__ import annotations

import json
import re
import sys

import pytest

from seqmodels.evaluation import needle as needle_module
from seqmodels.evaluation.needle import NeedlePlan, default_lengths, evaluate_needle
from seqmodels.tasks.recall.needle import VARIANTS, needle

PLAN = NeedlePlan(lengths=(120, 240), depths=(0.0, 0.5, 1.0), count=2, generated=4, seed=1)


DRAW = needle_module.draw


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Pictures take most of the time of a small map."""
    monkeypatch.setattr(needle_module, "draw", lambda found, path: path.write_bytes(b"picture"))


class Reader:
    """Finds the number when it stands among its prompt's last ``reach`` words; a token is a word."""

    name, identity, front, prefix_token, batch_size = "reader", "r1", [0], None, 1

    def __init__(self, reach, fails_after=None):
        self.reach, self.fails_after, self.max_length = reach, fails_after, None
        self.prompts = []

    def encode(self, text):
        return list(range(len(text.split())))

    def generate(self, prompts, *, max_new_tokens, stop=(), window=None):
        if self.fails_after is not None and len(self.prompts) >= self.fails_after:
            raise KeyboardInterrupt
        self.prompts += prompts
        assert all(1 + len(prompt.split()) + max_new_tokens <= window for prompt in prompts)
        return [" ".join(re.findall(r"\d{7}", " ".join(prompt.split()[-self.reach :]))) for prompt in prompts]


def test_the_map_shows_how_far_a_model_reaches(tmp_path):
    found = evaluate_needle(Reader(75), tmp_path, PLAN)
    # 22 words of the question are read too: 50 of the haystack are what is left.
    assert found.accuracy == [[0, 0], [1, 0], [1, 1]]
    summary = json.loads((tmp_path / "needle.json").read_text())
    assert summary["accuracy"] == found.accuracy
    assert summary["lengths"] == [120, 240]


def test_a_picture_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(needle_module, "draw", DRAW)
    evaluate_needle(Reader(75), tmp_path, PLAN)
    from matplotlib.image import imread

    picture = imread(tmp_path / "needle.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 300
    # The two ends of the colour scale are both there: found (yellow) and not found (dark violet).
    colours = {tuple((colour[:3] * 255).round().astype(int)) for colour in picture.reshape(-1, picture.shape[2])[::7]}
    assert (253, 231, 37) in colours
    assert (68, 1, 84) in colours


def test_a_missing_package_is_found_before_the_answers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = Reader(75)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'seqmodels\[train\]'"):
        evaluate_needle(model, tmp_path, PLAN)
    assert model.prompts == []


def test_a_killed_map_goes_on_and_keeps_its_answers(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate_needle(Reader(75, fails_after=4), tmp_path, PLAN)
    kept = (tmp_path / "needle.jsonl").read_bytes()
    assert kept.count(b"\n") == 1 + 4
    model = Reader(75)
    found = evaluate_needle(model, tmp_path, PLAN)
    assert len(model.prompts) == 8
    assert (tmp_path / "needle.jsonl").read_bytes().startswith(kept)
    whole = evaluate_needle(Reader(75), tmp_path / "other", PLAN)
    assert found.accuracy == whole.accuracy
    again = Reader(75)
    assert evaluate_needle(again, tmp_path, PLAN).accuracy == found.accuracy
    assert again.prompts == []


def test_results_of_something_else_are_never_overwritten(tmp_path):
    evaluate_needle(Reader(75), tmp_path, PLAN)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Reader(75)
    other.identity = "r2"
    with pytest.raises(ValueError, match="model is 'r1' there, 'r2' here"):
        evaluate_needle(other, tmp_path, PLAN)
    with pytest.raises(ValueError, match="seed is 1 there, 2 here"):
        evaluate_needle(Reader(75), tmp_path, PLAN._replace(seed=2))
    with pytest.raises(ValueError, match="variant is 'niah_single_1' there"):
        evaluate_needle(Reader(75), tmp_path, PLAN._replace(variant="niah_single_2"), text="One. Two.")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_another_haystack_is_something_else_also_when_it_is_the_default(tmp_path, monkeypatch):
    plan = PLAN._replace(variant="niah_single_2", count=1)
    monkeypatch.setattr(needle_module, "local_text", lambda: "One is here. Two is there.")
    evaluate_needle(Reader(75), tmp_path, plan)
    evaluate_needle(Reader(75), tmp_path, plan, text="One is here. Two is there.")
    monkeypatch.setattr(needle_module, "local_text", lambda: "Another Python. Other sentences.")
    with pytest.raises(ValueError, match=r"text is '\w+' there"):
        evaluate_needle(Reader(75), tmp_path, plan)
    with pytest.raises(ValueError, match="niah_single_1 hides its needle in noise and reads no text"):
        evaluate_needle(Reader(75), tmp_path / "noise", PLAN, text="One. Two.")


def test_a_map_grows_by_lengths_and_count(tmp_path):
    evaluate_needle(Reader(75), tmp_path, PLAN._replace(lengths=(120,), count=1))
    model = Reader(75)
    steps = []
    found = evaluate_needle(model, tmp_path, PLAN, progress=lambda done, total: steps.append((done, total)))
    assert len(model.prompts) == 12 - 3
    assert found.accuracy == evaluate_needle(Reader(75), tmp_path / "whole", PLAN).accuracy
    assert (steps[0], steps[-1]) == ((3, 12), (12, 12))
    records = [(tmp_path / name / "needle.jsonl").read_text().splitlines() for name in (".", "whole")]
    assert sorted(records[0]) == sorted(records[1])
    smaller = evaluate_needle(Reader(75), tmp_path, PLAN._replace(lengths=(240,)))
    assert smaller.accuracy == [[line[1]] for line in found.accuracy]


def test_lengths_that_fit_the_tokenizer():
    # 77 words of a prompt with one line of noise, the separator, the answer: 82 * 4 / 3 is below 128, 206 * 4 / 3 not.
    assert default_lengths(Reader(75), generated=4) == (128, 256, 512, 1024)
    assert default_lengths(Reader(75), generated=128) == (512, 1024, 2048, 4096)
    bytes_reader = Reader(75)
    bytes_reader.encode = lambda text: list(text.encode())
    assert default_lengths(bytes_reader) == (1024, 2048, 4096, 8192)
    bytes_reader.max_length = 2048
    assert default_lengths(bytes_reader) == (1024, 2048)
    bytes_reader.max_length = 512
    with pytest.raises(ValueError, match="reads 512 tokens; niah_single_1 with an answer of 128 needs 1024"):
        default_lengths(bytes_reader)
    for variant in VARIANTS:  # the shortest holds the prompts of every variant
        (length, *_) = default_lengths(Reader(75), variant, text="One is here. Two is there.")
        plan = PLAN._replace(variant=variant, lengths=(length,), generated=128)
        assert len(needle(plan.variant, 9, length, lambda text: len(text.split()), text="One is here.")) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "niah"}, "unknown variant 'niah'"),
        ({"lengths": ()}, r"lengths are \[\]"),
        ({"lengths": (240, 120)}, "expected at least one, ascending"),
        ({"depths": (0.0, 0.0)}, "none twice"),
        ({"generated": 0}, "generated is 0"),
        ({"lengths": (40,)}, "40 tokens are too few"),
        ({"count": 0}, "count is 0"),
    ],
)
def test_plans_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_needle(Reader(75), tmp_path, PLAN._replace(**changes))


def test_lengths_beyond_the_model_are_refused(tmp_path):
    model = Reader(75)
    model.max_length = 200
    with pytest.raises(ValueError, match="length 240 is beyond the 200 tokens"):
        evaluate_needle(model, tmp_path, PLAN)
