"""What a model costs (parameters, state bytes, FLOPs), or what this installation can do.

With a configuration: a table by kind of layer, built without making a weight. Without one:
versions, devices, and which backends are present or missing, why, and how to get them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "einops",
    "safetensors",
    "transformers",
    "datasets",
    "flash-attn",
    "causal-conv1d",
)
COST = {
    "cpu": "ops with C++ kernels run in plain PyTorch on the CPU, several times slower",
    "triton": "GPU tensors run through plain PyTorch or CUDA kernels",
    "cuda": "GPU tensors run through Triton or plain PyTorch",
}


def command(
    config: Annotated[Path | None, typer.Argument(help="a model's YAML file, or a training run's")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes to it")] = None,
    length: Annotated[int, typer.Option(min=1, help="context length that states and FLOPs are counted for")] = 2048,
    dtype: Annotated[str, typer.Option(help="dtype of parameters and caches: float32, bfloat16, ...")] = "float32",
) -> None:
    """What a model costs, from its configuration; without one, what this installation can do."""
    console = Console()
    if config is None:
        _installation(console)
    else:
        _model(console, config, overrides or [], length, dtype)


def _model(console: Console, path: Path, overrides: list[str], length: int, dtype: str) -> None:
    from seqmodels.models.accounting import account
    from seqmodels.models.config import read_model_config
    from seqmodels.models.initialization import dtype_named

    model = read_model_config(path, overrides)
    rows = account(model, length=length, dtype=dtype_named(dtype))
    table = Table(
        title=f"{path}\nd_model {model.d_model}, vocab_size {model.vocab_size}, {rows[-1].sites} blocks, "
        f"one sequence of {length:,} tokens"
    )
    table.add_column("part", no_wrap=True)
    for heading in ("sites", "parameters", "state bytes", "FLOPs", "per token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        counts = (f"{count:,}" for count in (row.sites, row.parameters, row.state_bytes))
        table.add_row(row.name, *counts, f"{row.flops:.3e}", f"{row.flops / length:.3e}")
    console.print(table)
    size = rows[-1].parameters * dtype_named(dtype).itemsize / 2**20
    console.print(
        f"Weights in {dtype}: {size:,.1f} MiB. "
        "FLOPs are of a forward, a multiplication and an addition each counting one."
    )


def _installation(console: Console) -> None:
    import torch

    import seqmodels
    from seqmodels.backends import BACKENDS, missing, preference

    table = Table("what", "version", title=f"seqmodels {seqmodels.__version__}")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    threads = (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    table.add_row("CPU", threads)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        table.add_row(f"GPU {index}", f"{properties.name}, {size:.0f} GiB, sm_{properties.major}{properties.minor}")
    if not torch.cuda.is_available():
        table.add_row("GPU", "none visible to torch")
    console.print(table)
    table = Table("backend", "here", "why not, and how to get it", "what its absence costs", title="Backends")
    for name in BACKENDS:
        reason = missing(name)
        if reason is None:
            table.add_row(name, "yes", "", "")
        else:
            table.add_row(name, "no", reason, COST[name])
    console.print(table)
    for device in ("cpu", "cuda"):
        console.print(f"auto on {device}: the first that is here and has the op, of {', '.join(preference(device))}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
