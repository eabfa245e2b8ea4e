"""The heat map: what it asks, what it draws, what survives a kill."""

from __future__ import annotations

import json
import re

import pytest

from seqmodels.evaluation.needle import NeedlePlan, evaluate_needle

PLAN = NeedlePlan(lengths=(120, 240), depths=(0.0, 0.5, 1.0), count=2, generated=4, seed=1)


class Reader:
    """Finds the number when it stands among its prompt's last ``reach`` words; a token is a word."""

    name, identity, front, prefix_token = "reader", "r1", [0], None

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


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    evaluate_needle(Reader(75), tmp_path, PLAN)
    from matplotlib.image import imread

    picture = imread(tmp_path / "needle.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 300
    # The two ends of the colour scale are both there: found (yellow) and not found (dark violet).
    colours = {tuple((colour[:3] * 255).round().astype(int)) for colour in picture.reshape(-1, picture.shape[2])[::7]}
    assert (253, 231, 37) in colours
    assert (68, 1, 84) in colours


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
    with pytest.raises(ValueError, match="text is None there"):
        evaluate_needle(Reader(75), tmp_path, PLAN, text="One. Two.")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


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
