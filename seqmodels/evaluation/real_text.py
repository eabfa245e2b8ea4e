"""Real-text recall of a model: generate behind each prompt, look for the answer, keep what is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels.evaluation.records import Records
from seqmodels.evaluation.text_model import TextModel, fingerprint, groups, shortened
from seqmodels.tasks.real_text import MAX_NEW_TOKENS, STOP, WINDOW, questions
from seqmodels.tasks.recall_scoring import contains

SUFFIX = ".answers"  # JSON lines; not .jsonl, which in a results folder are rows


class RecallScore(NamedTuple):
    """``correct`` of ``total`` questions, with their answers in ``path``.

    Attributes:
        dropped: examples that the cut leaves out.
        shortened: prompts that lost their beginning to the window.
    """

    task: str
    layout: str
    limit: int | None
    correct: int
    total: int
    dropped: int
    shortened: int
    path: Path

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as a mean of independent answers."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.total)


def evaluate_recall(
    model: TextModel,
    task: str,
    examples: Sequence[dict[str, Any]],
    folder: str | Path,
    *,
    layout: str = "default",
    limit: int | None = 2048,
    window: int = WINDOW,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> RecallScore:
    """accuracy = mean over questions of [any gold answer is in the text generated up to the first new line].

    Answers go to ``folder/TASK-LAYOUT-LIMIT.answers`` as they are finished; the same call goes on from there, and so
    does one with more examples.

    Args:
        examples: from :func:`~seqmodels.tasks.real_text.load_examples`.
        limit: tokens of a document and its answer (before it is read twice); None cuts nothing.
        window: tokens of prompt and answer; of a longer prompt the beginning is left out.

    Raises:
        ValueError: no question left, or answers of another model or data set in the file.
    """
    asked = questions(task, examples, model, layout=layout, limit=limit)
    header = {
        "task": task, "layout": layout, "limit": limit, "window": window, "max_new_tokens": max_new_tokens,
        "model": model.identity,
    }  # fmt: skip
    name = f"{task}-{layout}-{'uncut' if limit is None else limit}"
    records = Records(Path(folder) / f"{name}{SUFFIX}", header)
    digests = {question.index: fingerprint(json.dumps(question)) for question in asked}
    for question in asked:
        kept = records.items.get(str(question.index))
        if kept is not None and kept["question"] != digests[question.index]:
            raise ValueError(
                f"{records.path} answers another question at example {question.index}: it is of other data (NQ of "
                "another size, say); give another --out, or move the file away"
            )

    def show() -> None:
        if progress is not None:
            progress(sum(str(index) in records.items for index in digests), len(asked))

    show()
    waiting = [question for question in asked if str(question.index) not in records.items]
    waiting.sort(key=lambda question: -len(question.prompt))  # little padding, and the largest batch fits or none does
    for group in groups(waiting, model):
        texts = model.generate(
            [question.prompt for question in group], max_new_tokens=max_new_tokens, stop=STOP, window=window
        )
        for question, text in zip(group, texts, strict=True):
            records.add(
                str(question.index), question=digests[question.index], text=text, answers=question.answers,
                correct=contains(text, question.answers),
            )  # fmt: skip
        show()
    correct = sum(records.items[str(question.index)]["correct"] for question in asked)
    cut = shortened(model, (question.prompt for question in asked), window, max_new_tokens)
    return RecallScore(task, layout, limit, correct, len(asked), len(examples) - len(asked), cut, records.path)
