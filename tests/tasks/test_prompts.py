"""Prompt layouts of JRT's six tasks, written out."""

from __future__ import annotations

import pytest

from seqmodels.tasks.prompts import TASKS, default_prompt, read_twice, repeat_prompt

PAGE = {"text": "Device X. Made in 2001..\n", "key": "year", "value": "2001"}
CLOZE = {
    "context": "Rome is old. It lies on the Tiber. Rome lies on", "question": "Rome lies on",
    "orig_question": "where does rome lie", "answers": ["the Tiber"],
}  # fmt: skip
SQUAD = {
    "text": "Oslo is in Norway. The country of Oslo is ", "context": "Oslo is in Norway. Question: which",
    "question": "Where is Oslo?",
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "fields", "once", "twice"),
    [
        ("fda", PAGE, "Device X. Made in 2001. Year:",
         "Information about Year. Device X. Made in 2001.\nDevice X. Made in 2001. Year:"),
        ("swde", {**PAGE, "text": PAGE["text"] + "Summary of information above... year:"},
         "Device X. Made in 2001. Year:",
         "Information about Year. Device X. Made in 2001.\nDevice X. Made in 2001. Year:"),
        ("squad", SQUAD, "Oslo is in Norway. The country of Oslo is",
         "Where is Oslo? Oslo is in Norway. \nOslo is in Norway. The country of Oslo is"),
        *(
            (task, CLOZE, "Rome is old. It lies on the Tiber. Rome lies on",
             "where does rome lie Rome is old. It lies on the Tiber.\nRome is old. It lies on the Tiber. Rome lies on")
            for task in ("nq", "triviaqa", "drop")
        ),
    ],
)  # fmt: skip
def test_layouts(task, fields, once, twice):
    assert default_prompt(task, fields) == once
    assert read_twice(task, fields) == twice


def test_a_question_that_the_document_ends_with_is_not_asked_twice():
    asked = {**PAGE, "text": "Device X. Made in 2001.Year:YEAR:"}
    assert default_prompt("fda", asked) == default_prompt("fda", PAGE)


def test_every_task_names_a_field_that_is_missing():
    for task, layout in TASKS.items():
        complete = {name: "text" for name in layout.twice_fields}
        read_twice(task, complete)
        for name in layout.twice_fields:
            for wrong in ({**complete, name: " "}, {key: complete[key] for key in complete if key != name}):
                with pytest.raises(ValueError, match=f"{task}: field '{name}' is .*expected a non-empty text"):
                    read_twice(task, wrong)


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown task 'trivia_qa'.*triviaqa"):
        read_twice("trivia_qa", {})


def test_repeat_prompt():
    assert repeat_prompt("context.", "question?") == "context. question?\ncontext. question?"
    assert repeat_prompt("both", separator=" | ") == "both | both"
    with pytest.raises(ValueError, match="context is empty"):
        repeat_prompt("", "question")
