"""Real-text recall: what is loaded, what is cut, what is scored."""

from __future__ import annotations

import json

import pytest

from seqmodels.tasks.corpus import CorpusError
from seqmodels.tasks.real_text import TASKS, answers, load_examples, questions, truncated
from seqmodels.tasks.recall_scoring import contains, cut_at

PAGE = {"text": "a b c d e f g h", "key": "colour", "value": "red"}
CLOZE = {"context": "a b c", "question": "it is", "orig_question": "what is it", "answers": ["c d", "b"]}
SQUAD = {"text": "Oslo lies in", "context": "Oslo. Question: where", "question": "Where?", "value": "Norway"}
EXAMPLES = {
    task: PAGE if task in ("fda", "swde") else SQUAD if task == "squad" else CLOZE for task in TASKS
}  # fmt: skip


class Words:
    """A token is a word."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, tokens):
        return " ".join(self.words[token] for token in tokens)


# The score


@pytest.mark.parametrize(
    ("generation", "golds", "right"),
    [
        ("", ["x"], False),
        ("It is RED.", ["red"], True),
        ("it is re", ["red"], False),
        ("cost: $5.1* (net)", ["$5.1*"], True),
        ("cost: $5x1", ["$5.1"], False),  # a full stop is no wildcard
        ("(a|b)", ["b)"], True),
        ("13", ["3"], True),  # one character is an answer like any other
        ("none of them", ["x", "THEM"], True),
        (" ends with gold ", ["gold "], True),
        ("ÉTÉ", ["été"], True),
    ],
)
def test_contains(generation, golds, right):
    assert contains(generation, golds) is right


@pytest.mark.parametrize("golds", [[], [""], ["red", " "]])
def test_an_empty_answer_would_always_be_right_and_is_refused(golds):
    with pytest.raises(ValueError, match="none of them empty"):
        contains("anything", golds)


def test_cut_at_the_first_of_the_stops():
    assert cut_at("ab\ncd.", ("\n", ".")) == "ab"
    assert cut_at("ab", ("\n",)) == "ab"
    assert cut_at("\nab", ("\n",)) == ""
    assert cut_at("ab", ()) == "ab"


# The cut


def page(size, value_at, key_at=None):
    words = [f"w{i}" for i in range(size)]
    words[value_at] = "RED"
    if key_at is not None:
        words[key_at] = "Colour"
    return {**PAGE, "text": " ".join(words)}


def kept(example, limit, task="fda", field="text"):
    found = truncated(task, example, Words(), limit)
    assert found is not None
    return found[field].split()


def test_the_cut_is_centred_on_the_earliest_anchor():
    # want = 60 - 50 = 10: five words before the anchor, the anchor and four after it.
    assert kept(page(100, 40), 60) == page(100, 40)["text"].split()[35:45]
    assert kept(page(100, 40, key_at=20), 60) == page(100, 40, 20)["text"].split()[15:25]
    assert kept(page(100, 20, key_at=40), 60) == page(100, 20, 40)["text"].split()[15:25]
    # An odd number: want = 11 has 5 before.
    assert kept(page(100, 40), 61) == page(100, 40)["text"].split()[35:46]


def test_the_cut_stays_inside_the_document():
    assert kept(page(100, 2), 60) == page(100, 2)["text"].split()[:10]
    assert kept(page(100, 99), 60) == page(100, 99)["text"].split()[94:]


def test_an_anchor_that_does_not_occur_keeps_half_from_the_end():
    words = [f"w{i}" for i in range(100)]
    assert kept({**PAGE, "text": " ".join(words)}, 60) == words[95:]


def test_a_document_that_fits_is_not_touched():
    example = {**PAGE, "text": "  RED  b\nc "}
    assert truncated("fda", example, Words(), 60) is example


def test_short_anchors_drop_an_example_only_where_they_are_looked_for():
    assert truncated("fda", {**PAGE, "value": "3"}, Words(), 60) is None
    assert truncated("swde", {**PAGE, "key": "k"}, Words(), 60) is None
    assert truncated("nq", {**CLOZE, "answers": ["3", "three"]}, Words(), 60) is None
    for task in ("triviaqa", "drop"):
        assert truncated(task, {**CLOZE, "answers": ["3"]}, Words(), 60) is not None
    assert [q.answers for q in questions("fda", [{**PAGE, "value": "3"}], Words(), limit=None)] == [("3",)]


def test_cloze_tasks_keep_the_first_answer_or_the_beginning():
    words = [f"w{i}" for i in range(100)]
    words[50], words[10] = "Paris", "Rome"
    example = {**CLOZE, "context": " ".join(words), "answers": ["paris", "rome"]}
    assert kept(example, 60, "nq", "context") == words[45:55]
    for task in ("triviaqa", "drop"):
        assert kept(example, 60, task, "context") == words[:10]


def test_an_anchor_with_the_characters_of_patterns_is_found_as_it_stands():
    words = [f"w{i}" for i in range(100)]
    words[30], words[60] = "a+b", "(a+b)*"
    example = {**PAGE, "text": " ".join(words), "value": "(a+b)*"}
    assert kept(example, 60) == words[55:65]


def test_squad_is_never_cut():
    long = {**SQUAD, "text": "word " * 500}
    assert truncated("squad", long, Words(), 60) is long


def test_questions_lay_out_the_cut_document_once_or_twice():
    codec = Words()
    (once,) = questions("fda", [page(100, 40)], codec, limit=60)
    (twice,) = questions("fda", [page(100, 40)], codec, layout="twice", limit=60)
    document = " ".join(page(100, 40)["text"].split()[35:45]) + "."
    assert once == (0, f"{document} Colour:", ("red",))
    assert twice.prompt == f"Information about Colour. {document}\n{document} Colour:"
    dropped = [{**PAGE, "value": "3"}, PAGE]
    assert [q.index for q in questions("fda", dropped, codec, limit=60)] == [1]


def test_questions_refuse_layouts_and_limits():
    with pytest.raises(ValueError, match=r"unknown layout 'twise'.*twice"):
        list(questions("fda", [PAGE], Words(), layout="twise"))
    with pytest.raises(ValueError, match="limit is 50; expected more than the 50 tokens"):
        list(questions("fda", [PAGE], Words(), limit=50))
    with pytest.raises(ValueError, match="limit is 60 and codec None; a cut needs the tokenizer"):
        questions("fda", [PAGE], None, limit=60)
    with pytest.raises(ValueError, match="fda: none of 1 examples is left at limit=60"):
        questions("fda", [{**PAGE, "value": "3"}], Words(), limit=60)
    assert questions("fda", [PAGE], None, limit=None) == questions("fda", [PAGE], Words(), limit=None)


# Loading


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_loads_from_lines_and_has_both_layouts(task, tmp_path):
    write_lines(tmp_path / f"{task}.jsonl", [EXAMPLES[task]] * 2)
    found = load_examples(task, tmp_path)
    assert found == [EXAMPLES[task]] * 2
    assert found == load_examples(task, tmp_path / f"{task}.jsonl")
    assert answers(task, found[0]) == (tuple(CLOZE["answers"]) if "answers" in found[0] else (found[0]["value"],))
    for layout in ("default", "twice"):
        assert len(list(questions(task, found, Words(), layout=layout))) == 2


def test_a_saved_data_set_is_read_by_its_validation_split(tmp_path):
    datasets = pytest.importorskip("datasets", reason="saved data sets need the datasets package")
    table = datasets.Dataset.from_list([PAGE])
    datasets.DatasetDict({"validation": table}).save_to_disk(str(tmp_path / "fda"))
    table.save_to_disk(str(tmp_path / "swde"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "nq"))
    assert load_examples("fda", tmp_path) == [PAGE]
    assert load_examples("fda", tmp_path / "fda") == [PAGE]
    assert load_examples("swde", tmp_path) == [PAGE]
    with pytest.raises(CorpusError, match="no split 'validation', only train"):
        load_examples("nq", tmp_path)


def test_what_is_missing_says_where_to_get_it(tmp_path):
    with pytest.raises(CorpusError, match=r"neither fda.jsonl.*hazyresearch/based-fda.*fields text, key, value"):
        load_examples("fda", tmp_path)
    with pytest.raises(CorpusError, match="does not exist"):
        load_examples("fda", str(tmp_path / "absent.jsonl"))
    (tmp_path / "fda.jsonl").write_text("")
    with pytest.raises(CorpusError, match=r"holds no example.*hazyresearch/based-fda"):
        load_examples("fda", tmp_path)
    write_lines(tmp_path / "nq.jsonl", [CLOZE, {**CLOZE, "answers": ["", " "], "question": None}])
    with pytest.raises(CorpusError, match=r"example 1 of .* lacks question, answers \(as text.*based_nq_512"):
        load_examples("nq", tmp_path, nq_size=512)
    write_lines(tmp_path / "fda.jsonl", [{"text": "a", "clef": "b", "value": 3}])
    with pytest.raises(CorpusError, match=r"example 0 of .* lacks key, value .*; it has text, clef, value; fda is"):
        load_examples("fda", tmp_path)
    write_lines(tmp_path / "fda.jsonl", [PAGE, {**PAGE, "text": "half of \ud83e\udd8a: \ud83e"}])
    with pytest.raises(CorpusError, match=r"fda.jsonl:2 holds half of a surrogate pair"):
        load_examples("fda", tmp_path)
    write_lines(tmp_path / "fda.jsonl", [{**PAGE, "text": "\ud83e\udd8a"}])  # escapes of a whole character
    assert load_examples("fda", tmp_path)[0]["text"] == "\U0001f98a"
    (tmp_path / "drop.jsonl").write_text('{"context": \n')
    with pytest.raises(CorpusError, match=r"drop.jsonl:1 is not JSON"):
        load_examples("drop", tmp_path)
    (tmp_path / "drop.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match=r"drop.jsonl is no UTF-8 text"):
        load_examples("drop", tmp_path)
    with pytest.raises(ValueError, match=r"unknown task 'trivia_qa'.*triviaqa"):
        load_examples("trivia_qa")
    with pytest.raises(ValueError, match="nq_size is 3"):
        load_examples("nq", nq_size=3)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the hub needs the datasets package")

    def unreachable(*_args, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CorpusError, match=r"cannot load 'hazyresearch/based_drop' \(ConnectionError: no network\)"):
        load_examples("drop")
