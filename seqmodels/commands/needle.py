"""Draw how well a trained model finds a needle, by depth and length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="a run folder, a saved model, or hf:NAME")],
    out: Annotated[
        Path | None,
        typer.Option(help="folder of answers, needle.json and needle.png, finished ones kept; RUN/VARIANT if absent"),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(help="niah_single_1 (noise, a number), _2 (essay, a number) or _3 (essay, a UUID)"),
    ] = "niah_single_1",
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="tokens, answer included; several times; four powers of two that fit the tokenizer if absent"
        ),
    ] = None,
    depths: Annotated[int, typer.Option(min=2, help="even places from the beginning (0 %) to the end (100 %)")] = 11,
    count: Annotated[int, typer.Option(min=1, help="prompts at each length and depth")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens of the answer, inside the length")] = 128,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="file of the haystack of 2 and 3; Python's library if absent"),
    ] = None,
    seed: Annotated[int, typer.Option(help="same seed, same prompts")] = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts side by side: speed against memory")] = 8,
    device: Annotated[str, typer.Option(help="auto takes CUDA when there")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights; as stored when omitted")] = None,
) -> None:
    """Draw how well a trained model finds a needle, by depth and length.

    A sentence with a number or a UUID is hidden in a text and asked for at its end (RULER's S-NIAH). The picture
    shows the share that is found for each depth and length. The same command goes on where a killed one was, also
    with more lengths or a larger count; results of another model or other settings are refused, never overwritten.
    """
    from rich.console import Console
    from rich.progress import Progress

    from seqmodels.evaluation.needle import FIGURE, SUMMARY, NeedlePlan, check_variant, default_lengths, evaluate_needle
    from seqmodels.evaluation.text_model import check_model_name, open_text_model, results_folder

    check_variant(variant)
    check_model_name(model)
    folder = results_folder(model, out, variant)
    try:
        haystack = None if text is None else text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {text} is no UTF-8 text: {error}") from error
    opened = open_text_model(model, device=device, dtype=dtype, batch_size=batch_size)
    plan = NeedlePlan(
        variant,
        tuple(sorted(length)) if length else default_lengths(opened, variant, generated=max_new_tokens, text=haystack),
        tuple(index / (depths - 1) for index in range(depths)),
        count,
        max_new_tokens,
        seed,
    )
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task("prompts", total=None)
        found = evaluate_needle(
            opened, folder, plan, text=haystack,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    for size, column in zip(plan.lengths, zip(*found.accuracy, strict=True), strict=True):
        print(f"{size:>7} tokens: {100 * sum(column) / len(column):5.1f} % found")
    print(f"wrote {folder / FIGURE} and {folder / SUMMARY}")
