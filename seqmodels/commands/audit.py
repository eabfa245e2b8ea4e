"""Compile every GPU kernel without a GPU and report registers, spills, shared memory, matrix instructions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    quick: Annotated[bool, typer.Option(help="The default configuration of every kernel once, for sm_90.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help="sm_80, sm_86, sm_90, sm_100 or gfx942; may be given again. All by default."),
    ] = None,
    kernel: Annotated[str | None, typer.Option(help="Only kernels whose name contains this.")] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="Audit your own kernels: an import path or a .py file with KERNELS.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all rows as JSON to this file.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write the table as a page.")] = None,
    failures_only: Annotated[bool, typer.Option(help="Print the rows that fail, not all of them.")] = False,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Record this run's registers and shared memory.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    cache: Annotated[bool, typer.Option(help="Reuse results of kernels whose code did not change.")] = True,
) -> None:
    """Compile every GPU kernel without a GPU and report registers, spills, shared memory, matrix instructions.

    For sm_90 every shipped tile, dtype and representative head size is compiled; for sm_80, sm_86, sm_100
    and gfx942 the default configuration; csrc/cuda with nvcc. Exit status 1 on a spill, an overrun of shared
    memory, matrix units left idle, a kernel nobody registered, or more registers or shared memory than the
    baseline records. Needs Triton, no GPU.
    """
    from rich.console import Console
    from rich.progress import Progress

    from seqmodels.audit import report, run

    console = Console(width=None if sys.stdout.isatty() else 200)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("compiling", total=None)
        try:
            audit = run(
                quick=quick,
                targets=target,
                kernels=kernel,
                modules=module,
                workers=workers or os.cpu_count(),
                use_cache=cache,
                update_baseline=update_baseline,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except RuntimeError as error:
            typer.echo(f"seqmodels audit: {error}", err=True)
            raise typer.Exit(2) from error
    if json_path is not None:
        report.write(json_path, audit.to_json())
    if markdown_path is not None:
        report.write(markdown_path, report.markdown(audit, "seqmodels audit --markdown ..."))
    report.print_table(audit, console, every_row=not failures_only)
    if not audit.passed:
        raise typer.Exit(1)
