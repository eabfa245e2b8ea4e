"""What the task files call: data with its prompts, and the score."""

from __future__ import annotations

from typing import Any

from seqmodels.tasks.prompts import default_prompt, read_twice
from seqmodels.tasks.real_text import SPLIT, answers, load_examples
from seqmodels.tasks.recall_scoring import contains


def load(
    task: str, layout: str, nq_size: int = 2048, data: str | None = None, **_model_arguments: object
) -> dict[str, Any]:
    """The data set with the columns ``prompt`` and ``answers``.

    Args:
        task, layout, nq_size: from the task file.
        data: ``--metadata '{"data": FOLDER}'``, see :func:`seqmodels.tasks.real_text.load_examples`.
    """
    import datasets

    write = read_twice if layout == "twice" else default_prompt
    rows = [
        {"prompt": write(task, example), "answers": list(answers(task, example))}
        for example in load_examples(task, data, nq_size=nq_size)
    ]
    return {SPLIT: datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"contains": float(contains(results[0], doc["answers"]))}
