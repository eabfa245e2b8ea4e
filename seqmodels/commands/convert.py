"""Checkpoints of other libraries into this one's format and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    pass


@app.command()
def mamba3(
    path: Annotated[Path, typer.Argument(help="a released folder (config.json) or a model of this library")],
    out: Annotated[Path, typer.Argument(help="folder to write in the other format")],
    pairing: Annotated[
        str | None, typer.Option(help="rotated lanes of a released checkpoint: adjacent (SISO) or half (MIMO)")
    ] = None,
    a_activation: Annotated[
        str | None, typer.Option(help="heavy_tail (released since June 2026) or softplus (before)")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer to write down; the Llama-3.1 one by default")] = None,
) -> None:
    """A released Mamba-3 checkpoint into a model folder, or a model folder into a released one."""
    from seqmodels.convert.mamba3 import TOKENIZER, ConversionError, from_released, is_released, to_released

    if is_released(path):
        moved = from_released(path, out, pairing=pairing, a_activation=a_activation, tokenizer=tokenizer or TOKENIZER)
    else:
        for option, value in (("--pairing", pairing), ("--a-activation", a_activation), ("--tokenizer", tokenizer)):
            if value is not None:
                raise ConversionError(f"{option} is for released checkpoints; {path} is a model of this library")
        moved = to_released(path, out)
    table = Table("from", "to", "shape", "how", title=f"{path} to {out}: {len(moved)} tensors")
    for entry in moved:
        table.add_row(entry.source, entry.target, " x ".join(map(str, entry.shape)), entry.change)
    Console().print(table)
