"""What the task files call: data with its prompts, and the score."""

from __future__ import annotations

from typing import Any

from seqmodels.evaluation.codec import open_codec
from seqmodels.tasks.real_text import SPLIT, load_examples, questions
from seqmodels.tasks.recall_scoring import contains


def load(
    task: str,
    layout: str,
    limit: int | None = None,
    nq_size: int = 2048,
    data: str | None = None,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    **_model_arguments: object,
) -> dict[str, Any]:
    """The data set with the columns ``prompt`` and ``answers``, documents cut as ``seqmodels recall-text`` cuts them.

    Args:
        task, layout, limit, nq_size: from the task file; no limit cuts nothing.
        data: ``--metadata '{"data": FOLDER}'``, see :func:`seqmodels.tasks.real_text.load_examples`.
        pretrained, tokenizer: of ``--model_args``, which lm-eval passes on: the cut counts the model's own tokens.

    Raises:
        ValueError: a limit without a model to count the tokens of; no example that is left by the cut.
    """
    import datasets

    examples = load_examples(task, data, nq_size=nq_size)
    name = pretrained or tokenizer
    if limit is not None and name is None:
        raise ValueError(
            f"real_text_{task}_{limit} cuts documents to {limit} tokens of the model, and no model is named; expected "
            'pretrained=MODEL (or tokenizer=NAME) in --model_args. From Python: TaskManager(metadata={"pretrained": '
            "MODEL})"
        )
    codec = None if limit is None or name is None else open_codec(name, tokenizer)
    rows = [
        {"index": question.index, "prompt": question.prompt, "answers": list(question.answers)}
        for question in questions(task, examples, codec, layout=layout, limit=limit)
    ]
    return {SPLIT: datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"contains": float(contains(results[0], doc["answers"]))}
