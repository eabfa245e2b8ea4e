"""Measure recall in real text: FDA, SWDE, SQuAD, NQ, TriviaQA, Drop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

UNCUT = "none"


def command(
    model: Annotated[str, typer.Argument(help="a run folder, a saved model, or hf:NAME")],
    out: Annotated[
        Path | None, typer.Option(help="folder of the answers, finished ones kept; RUN/recall_text if absent")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="fda, swde, squad, nq, triviaqa, drop; all if absent")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="folder with TASK.jsonl or TASK/ of save_to_disk; the hub if absent"),
    ] = None,
    layout: Annotated[str, typer.Option(help="default, twice (JRT-Prompt) or both")] = "default",
    limit: Annotated[str, typer.Option(help="tokens that documents are cut to, or none")] = "2048",
    window: Annotated[int, typer.Option(min=1, help="tokens of prompt and answer; the beginning is left out")] = 2048,
    examples: Annotated[int | None, typer.Option(min=1, help="only the first so many of each task")] = None,
    nq_size: Annotated[int, typer.Option(help="documents of the hub's NQ: 512, 1024 or 2048 tokens")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts side by side: speed against memory")] = 8,
    device: Annotated[str, typer.Option(help="auto takes CUDA when there")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights; as stored when omitted")] = None,
) -> None:
    """Measure recall in real text: generate up to 48 tokens behind each prompt and look for the answer.

    The score is 1 where any gold answer occurs in the first line generated, whatever its case. Documents are cut
    around the answer as JRT does it; read twice, they need twice the window. The same command goes on where a
    killed one was.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from seqmodels.evaluation.real_text import evaluate_recall
    from seqmodels.evaluation.text_model import check_model_name, open_text_model, results_folder
    from seqmodels.tasks.real_text import LAYOUTS, TASKS, check_limit, load_examples, task_named

    if layout not in (*LAYOUTS, "both"):
        raise ValueError(f"--layout is {layout!r}; expected default, twice or both")
    if limit != UNCUT and not limit.isdecimal():
        raise ValueError(f"--limit is {limit!r}; expected a number of tokens or {UNCUT!r}")
    names = task or list(TASKS)
    for name in names:
        task_named(name)
    bound = None if limit == UNCUT else int(limit)
    if bound is not None:
        check_limit(bound)
    folder = results_folder(model, out, "recall_text")
    check_model_name(model)  # before a hub that may be slow, and data before weights, which may be large
    found = {name: load_examples(name, data, nq_size=nq_size)[:examples] for name in names}
    opened = open_text_model(model, device=device, dtype=dtype, batch_size=batch_size)
    table = Table(
        "task",
        "layout",
        "correct",
        "of",
        "accuracy in %",
        "dropped",
        "shortened",
        title=f"{opened.name}, limit {limit}",
    )
    lost = 0
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        for name in names:
            for kind in LAYOUTS if layout == "both" else (layout,):
                bar = progress.add_task(f"{name}, {kind}", total=None)

                def show(done: int, total: int, bar=bar) -> None:
                    progress.update(bar, completed=done, total=total)

                score = evaluate_recall(
                    opened, name, found[name], folder, layout=kind, limit=bound, window=window, progress=show
                )
                table.add_row(
                    name, kind, str(score.correct), str(score.total),
                    f"{100 * score.accuracy:.1f} ± {100 * score.standard_error:.1f}", str(score.dropped),
                    str(score.shortened),
                )  # fmt: skip
                lost += score.shortened
    Console().print(table)
    if lost:
        print(
            f"{lost} prompts lost their beginning to the window of {window} tokens (shortened): a larger --window or a "
            "smaller --limit reads them whole"
        )
