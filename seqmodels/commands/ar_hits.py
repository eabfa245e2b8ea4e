"""Measure perplexity on associative-recall hits: tokens that a repeated pair predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="a run folder, a saved model, or hf:NAME")],
    data: Annotated[str, typer.Option(help="text to score: a file, a folder, stdlib or hf:NAME[:CONFIG]")],
    out: Annotated[Path, typer.Option(help="JSON file of the result; must not exist yet")],
    train: Annotated[str | None, typer.Option(help="the model's training text, whose pairs are counted")] = None,
    table: Annotated[Path | None, typer.Option(help="counts of --train: written when missing, read when there")] = None,
    capacity: Annotated[int, typer.Option(min=1, help="different pairs counted at once, 16 bytes each")] = 1 << 24,
    suffixes: Annotated[list[str] | None, typer.Option(help="file name endings taken from folders")] = None,
    window: Annotated[int, typer.Option(min=4, help="tokens of a context")] = 2048,
    contexts: Annotated[int | None, typer.Option(min=1, help="only the first so many contexts")] = None,
    beside: Annotated[
        Path | None, typer.Option(help="result of another model on the same text: the share of the gap on AR hits")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="contexts side by side: speed against memory")] = 8,
    device: Annotated[str, typer.Option(help="auto takes CUDA when there")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights; as stored when omitted")] = None,
) -> None:
    """Measure perplexity on associative-recall hits: tokens that a repeated pair predicts.

    Two definitions: Zoology's (a pair seen before in the context and at most 1250 times in training) and JRT's
    (any pair seen before, second half of each context, by training count). Both by repeat distance.
    """
    import json

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from seqmodels.evaluation.associative_recall import check_window, count_bigrams, evaluate_hits, read_result
    from seqmodels.evaluation.text_model import open_text_model
    from seqmodels.tasks.associative_recall_hits import gap_share, slice_order
    from seqmodels.tasks.bigrams import BigramCounter
    from seqmodels.tasks.corpus import open_corpus

    if out.exists():
        raise ValueError(f"{out} exists; give another --out, or delete it")
    counted = None if table is None or not table.exists() else BigramCounter.load(table)
    if counted is None and train is None:
        raise ValueError("give --train, the text whose pairs are counted, or a --table that was written before")
    corpus = None if train is None else open_corpus(train, suffixes=tuple(suffixes or ()))
    if counted is not None and corpus is not None:
        counted.check_origin({"corpus": corpus.fingerprint})
    scored = open_corpus(data, suffixes=tuple(suffixes or ()))
    other = None if beside is None else read_result(beside)
    for path in (out, table):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    opened = open_text_model(model, device=device, dtype=dtype, batch_size=batch_size)
    check_window(opened, window)  # before hours of counting
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task("pairs", total=None)
        if counted is None:
            assert corpus is not None  # checked above
            counted = count_bigrams(
                opened, corpus, capacity, corpus=corpus.fingerprint,
                progress=lambda pairs: progress.update(bar, description=f"{pairs:,} pairs counted"),
            )  # fmt: skip
            if table is not None:
                counted.save(table)
        score = evaluate_hits(
            opened, scored, counted, window=window, contexts=contexts,
            progress=lambda done: progress.update(bar, description=f"{done:,} contexts scored"),
        )  # fmt: skip
    result = {"model": opened.name, "identity": opened.identity, "data": data, "window": window, **score.as_json()}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    same = other is not None and other.digest == score.digest
    for definition, slices in score.slices.items():
        shown = Table("tokens of", "number", "share", "perplexity", title=f"{definition}: {opened.name}")
        for name in slice_order(slices):
            part = slices[name]
            share = f"{100 * part.tokens / slices['all'].tokens:.1f} %" if slices["all"].tokens else ""
            shown.add_row(name, f"{part.tokens:,}", share, "" if part.perplexity is None else f"{part.perplexity:.3f}")
        Console().print(shown)
        if other is not None and same:
            share = gap_share(slices, other.slices[definition])
            if share is not None:
                print(f"{100 * share:.0f} % of the gap to {other.model} lies on hits")
    exact = "exact" if not score.count_error else f"too small by at most {score.count_error}"
    print(f"counts of {counted.pairs:,} training pairs are {exact}")
    print(f"wrote {out}")
    if other is not None and not same:
        raise ValueError(
            f"--beside {beside} was scored on other text, with another tokenizer, window or table of counts: there is "
            f"no gap to show; score {other.model} again with the --data, --window and --table of {out}"
        )
