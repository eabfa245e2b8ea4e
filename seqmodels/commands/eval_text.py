"""Measure a trained model's bits per byte and perplexity on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="a run folder, one of its checkpoints, or a saved model")],
    data: Annotated[str, typer.Option(help="a file, a folder, stdlib, hf:NAME[:CONFIG], or held-out: the run's own")],
    suffixes: Annotated[list[str] | None, typer.Option(help="file name endings taken from a folder")] = None,
    window: Annotated[int, typer.Option(min=1, help="tokens at a time; the state goes on between windows")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="documents side by side")] = 16,
    device: Annotated[str, typer.Option(help="auto takes CUDA when there")] = "auto",
) -> None:
    """Measure bits per byte, perplexity and speed on whole documents.

    The model's state is carried from window to window, so its context is a document's whole past.
    """
    import tempfile

    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from seqmodels.models.loading import load_model
    from seqmodels.tasks.corpus import open_corpus
    from seqmodels.tasks.evaluation import score_documents
    from seqmodels.tasks.token_cache import build_token_cache
    from seqmodels.tasks.tokenizer import load_tokenizer
    from seqmodels.training.data import load_text
    from seqmodels.training.run_folder import RunFolder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(run, device=device)
    with tempfile.TemporaryDirectory() as folder:
        if data == "held-out":
            config = RunFolder.open(run).config()
            text = load_text(config.data, seed=config.seed, vocab_size=config.model.vocab_size)
            cache, documents = text.held_out
        else:
            found = open_corpus(data, suffixes=tuple(suffixes or ()))
            cache = build_token_cache(found, load_tokenizer(loaded.tokenizer), Path(folder))
            documents = np.arange(len(cache.names))
        if not len(documents):
            raise ValueError(f"run {run} held nothing out (data.validation_fraction=0); give --data a path")
        with Progress(transient=True, console=Console(stderr=True)) as progress:
            task = progress.add_task("reading", total=None)
            score = score_documents(
                loaded.model, cache, documents, window=window, batch_size=batch_size,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
    table = Table(
        "measure", "value", title=f"{loaded.weights}\non {len(documents)} documents of {data}", title_justify="left"
    )
    table.add_row("bits per byte", f"{score.bits_per_byte:.4f}")
    table.add_row("perplexity per token", f"{score.perplexity:.3f}")
    table.add_row("tokens", f"{score.tokens:,}")
    table.add_row("bytes of text", f"{score.text_bytes:,}")
    table.add_row("tokens per second", f"{score.tokens_per_second:,.0f}")
    Console().print(table)
