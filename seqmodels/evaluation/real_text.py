"""Real-text recall of a model: generate behind each prompt, look for the answer, keep what is finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels.evaluation.records import Records
from seqmodels.evaluation.text_model import TextModel
from seqmodels.tasks.real_text import MAX_NEW_TOKENS, STOP, WINDOW, questions
from seqmodels.tasks.recall_scoring import contains

SUFFIX = ".answers"  # JSON lines; not .jsonl, which in a results folder are rows
GROUP = 32  # questions answered between two writes


class RecallScore(NamedTuple):
    """``correct`` of ``total`` questions; ``dropped``: examples that the cut leaves out; ``path``: the answers."""

    task: str
    layout: str
    limit: int | None
    correct: int
    total: int
    dropped: int
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

    Answers go to ``folder/TASK-LAYOUT-LIMIT.answers`` as they are finished; the same call goes on from there.

    Args:
        examples: from :func:`~seqmodels.tasks.real_text.load_examples`.
        limit: tokens of a document and its answer (before it is read twice); None cuts nothing.
        window: tokens of prompt and answer; of a longer prompt the beginning is left out.

    Raises:
        ValueError: no question left, or answers of another model or data set in the file.
    """
    asked = questions(task, examples, model, layout=layout, limit=limit)
    digest = hashlib.blake2b(digest_size=8)
    for question in asked:
        digest.update(json.dumps(question).encode())
    header = {
        "task": task, "layout": layout, "limit": limit, "window": window, "max_new_tokens": max_new_tokens,
        "model": model.identity, "questions": digest.hexdigest(),
    }  # fmt: skip
    name = f"{task}-{layout}-{'uncut' if limit is None else limit}"
    records = Records(Path(folder) / f"{name}{SUFFIX}", header)
    waiting = [question for question in asked if str(question.index) not in records.items]
    for begin in range(0, len(waiting), GROUP):
        group = waiting[begin : begin + GROUP]
        texts = model.generate(
            [question.prompt for question in group], max_new_tokens=max_new_tokens, stop=STOP, window=window
        )
        for question, text in zip(group, texts, strict=True):
            records.add(
                str(question.index), text=text, answers=question.answers, correct=contains(text, question.answers)
            )
        if progress is not None:
            progress(len(records.items), len(asked))
    correct = sum(records.items[str(question.index)]["correct"] for question in asked)
    return RecallScore(task, layout, limit, correct, len(asked), len(examples) - len(asked), records.path)
