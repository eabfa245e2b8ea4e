"""Suite ``real_text``: trained models, not layers: FDA, SWDE, SQuAD, NQ, TriviaQA and Drop in both layouts.

Models, tasks and the score are those of ``seqmodels recall-text``; here every score becomes a row, with the state that
the model keeps for the window. Answers are kept below ``DIR/answers``, so a killed run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evals.results import Results, latest, markdown_table
from seqmodels.evaluation.real_text import RecallScore, evaluate_recall
from seqmodels.evaluation.run_model import RunTextModel
from seqmodels.evaluation.text_model import TextModel, check_model_name, open_text_model
from seqmodels.models.loading import ModelFolderError
from seqmodels.tasks.real_text import LAYOUTS, NQ_SIZES, TASKS, WINDOW, check_limit, load_examples, task_named

NAME = "real_text"
ORDER = ("swde", "squad", "fda", "triviaqa", "nq", "drop")
# %, in ORDER. Default / read twice where a source has both.
PUBLISHED = {
    "Mamba-3 paper, 1.5B": {
        "Transformer": "48.9 46.6 58.4 67.5 31.7 26.4",
        "Gated DeltaNet": "32.7 40.0 28.3 63.5 25.7 24.5",
        "Mamba-3 SISO": "28.5 40.1 23.4 64.5 26.5 27.4",
        "Mamba-3 MIMO": "36.3 41.7 29.3 64.5 26.2 26.3",
    },
    "Gated DeltaNet paper, 1.3B": {
        "Transformer++": "29.5 38.0 52.2 58.3 22.5 21.6",
        "Mamba-2": "19.1 33.6 25.3 61.0 20.8 19.2",
        "Gated DeltaNet": "25.4 34.8 23.7 60.0 20.0 19.8",
    },
    "JRT paper, 1.3B": {
        "Transformer++": "50.8/65.0 41.1/58.1 83.7/89.2 56.6/58.8 32.8/37.5 21.5/37.9",
        "Mamba": "32.6/45.4 31.5/53.5 41.9/55.7 54.9/56.7 26.9/33.9 20.4/33.8",
        "Based": "37.1/54.0 38.9/56.3 60.2/68.3 54.5/57.6 29.4/35.2 21.7/39.1",
    },
}


def measure(
    results: Results,
    models: Sequence[str],
    *,
    data: str | None,
    tasks: Sequence[str] = (),
    limits: Sequence[int] = (2048,),
) -> int:
    """Scores every model on every task in both layouts at every limit; 0, the exit status.

    Args:
        models: run folders, saved models, or ``hf:NAME``.
        data: of :func:`seqmodels.tasks.real_text.load_examples`; None reads the hub.
        tasks: all six when empty.
        limits: tokens that documents are cut to. The hub has NQ in the sizes 512, 1024 and 2048: a limit takes its own
            or the next larger one.

    Raises:
        ValueError: no model, an unknown task, a data set that is missing.
    """
    if not models:
        raise ValueError(f"--suite {NAME} needs --models RUN ...: it tests trained models and trains none")
    for task in tasks:
        task_named(task)
    for limit in limits:
        check_limit(limit)
    for name in models:  # before a hub that may be slow
        check_model_name(name)
    names = tasks or list(TASKS)
    found = {
        (task, limit): load_examples(
            task, data, nq_size=next((size for size in NQ_SIZES if size >= limit), NQ_SIZES[-1])
        )
        for task in names
        for limit in limits
    }
    for name in models:
        try:
            model = open_text_model(name)
        except ModelFolderError as error:
            raise ValueError(str(error)) from error
        answers = results.path.parent / "answers" / model.identity
        for (task, limit), examples in found.items():
            for layout in LAYOUTS:
                score = evaluate_recall(model, task, examples, answers, layout=layout, limit=limit)
                _write(results, model, score)
                print(f"{name} {task} {layout}, cut to {limit}: {score.correct} of {score.total}")
    return 0


def _write(results: Results, model: TextModel, score: RecallScore) -> None:
    case = f"{NAME}/{score.task}/{score.layout}/limit={score.limit}/{model.name}"
    config = {
        "suite": NAME, "model": model.name, "identity": model.identity, "task": score.task, "layout": score.layout,
        "limit": score.limit, "window": WINDOW, "correct": score.correct, "total": score.total,
        "dropped": score.dropped, "shortened": score.shortened,
        "answers": hashlib.sha256(score.path.read_bytes()).hexdigest()[:16],
    }  # fmt: skip
    results.write(case, "contains", score.accuracy, "", backend="auto", config=config)
    if isinstance(model, RunTextModel):
        state = model.model.state_bytes(WINDOW)
        results.write(case, "state_bytes", state, "bytes", backend="auto", config={**config, "context_length": WINDOW})


def _mark(row: Mapping[str, Any]) -> str:
    return "\\*" if row["config"].get("shortened") else ""


def page(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the page: a table by model and layout, then published numbers; none without rows."""
    scores: dict[tuple[str, int | None, str], dict[str, Mapping[str, Any]]] = {}
    state: dict[str, float] = {}
    for row in latest(row for row in rows if row["config"].get("suite") == NAME and row["value"] is not None):
        about = row["config"]
        if row["metric"] == "contains":
            scores.setdefault((about["model"], about["limit"], about["layout"]), {})[about["task"]] = row
        else:
            state[about["model"]] = row["value"]
    if not scores:
        return
    found = [row for tasks in scores.values() for row in tasks.values()]
    machines, commits = (", ".join(sorted({row[name] for row in found})) for name in ("machine", "commit"))
    yield from (
        f"## Suite {NAME}",
        "",
        f"Measured by `python -m evals.recall --suite {NAME} --models RUN ... --out DIR`. {machines}. "
        f"Commit {commits}. Share of questions, in %, with a gold answer in the first line of at most 48 greedy "
        f"tokens; in brackets the number of questions. State in bytes for {WINDOW} tokens.",
        "",
    )

    def cells(key: tuple[str, int | None, str]) -> list[str]:
        model, limit, layout = key
        row = scores[key]
        values = [
            f"{100 * row[task]['value']:.1f} ({row[task]['config']['total']}){_mark(row[task])}" if task in row else ""
            for task in ORDER
        ]
        kept = f"{state[model]:,.0f}" if model in state else ""
        return [model, layout, str(limit), kept, *values]

    yield from markdown_table(["model", "layout", "cut to", "state", *ORDER], map(cells, sorted(scores, key=str)))
    if any(map(_mark, found)):
        yield from ("", f"\\* some prompts were longer than the window of {WINDOW} tokens and lost their beginning.")
    yield from ("", "Published. Documents are cut differently in each: compare inside a source only.", "")
    yield from markdown_table(
        ["source", "model", *ORDER],
        ([source, model, *numbers.split()] for source, rows in PUBLISHED.items() for model, numbers in rows.items()),
    )
    yield ""
