"""Time the shipped tiles of every Triton kernel on this GPU and keep the better ones."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    op: Annotated[list[str] | None, typer.Option(help="Only these ops; repeatable.")] = None,
    batch: Annotated[int, typer.Option(help="Batch of the problems that are timed.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Their length. Tiles are never chosen by length.", min=1)] = 4096,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what is stored for this GPU and stop.")] = False,
) -> None:
    """Time the shipped tiles of every Triton kernel on this GPU and keep the better ones.

    The result lies in the user's cache folder ($SEQMODELS_CACHE, else ~/.cache/seqmodels), one file a
    device, and is read at the next start. Without it the built-in heuristics choose. Nothing is ever tuned
    during training.
    """
    import importlib
    import pkgutil

    import torch

    import seqmodels.ops
    from seqmodels.ops import tiles

    if not torch.cuda.is_available():
        raise typer.BadParameter("no GPU is visible to torch; tuning needs the GPU that it is for")
    device = torch.device("cuda", torch.cuda.current_device())
    if reset:
        path = tiles.tuned_path(tiles.device_properties(device.index))
        path.unlink(missing_ok=True)
        typer.echo(f"removed {path}")
        return
    for module in pkgutil.iter_modules(seqmodels.ops.__path__, "seqmodels.ops."):
        if module.ispkg:
            importlib.import_module(module.name)  # registers its operators
    from seqmodels.ops.tuning import tune

    tune(device, ops=op, batch=batch, length=length, say=typer.echo)
