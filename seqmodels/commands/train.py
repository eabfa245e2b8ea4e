"""Train a language model from a YAML configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/train/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, strictly checked.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name of the configuration> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint.")] = False,
) -> None:
    """Train a language model from CONFIG, with key=value overrides.

    Alone, or on several processes: torchrun --nproc-per-node 8 -m seqmodels.cli train CONFIG.
    """
    from seqmodels.training.config import load_train_config
    from seqmodels.training.loop import train

    folder = out or Path("runs") / config.stem
    train(load_train_config(config, overrides), folder, resume=resume, console=Console())
