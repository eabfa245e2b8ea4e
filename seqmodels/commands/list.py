"""The layers that a model's configuration can name, and the backends of their ops."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def command(
    name: Annotated[str | None, typer.Argument(help="a layer, to see its arguments and their defaults")] = None,
) -> None:
    """The layers that a model's configuration can name; with a name, that layer's arguments."""
    console = Console()
    if name is None:
        console.print(_layers())
    else:
        _arguments(console, name)


def _layers() -> Table:
    from seqmodels.channel import CHANNELS
    from seqmodels.mixers import MIXERS

    table = Table("layer", "what it is", "sees", "op: backends")
    for registry in (MIXERS, CHANNELS):
        for name in registry.names():
            cls = registry[name]
            ops = "\n".join(f"{op}: {', '.join(backends)}" for op, backends in _ops(cls).items())
            table.add_row(name, describe(cls), cls.causality, ops or "plain PyTorch")
        table.add_section()
    return table


def describe(cls: type) -> str:
    """The first sentence of the module's docstring, or of the class's."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _ops(cls: type) -> dict[str, tuple[str, ...]]:
    """The ops that a layer's module imports, each with the backends that implement it."""
    from seqmodels.ops.registration import Operator

    source = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    modules = {
        (node.module or "").split(".")[2]
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqmodels.ops.")
    }
    result = {}
    for op in sorted(modules):
        package = importlib.import_module(f"seqmodels.ops.{op}")
        if not hasattr(package, "__path__"):
            continue
        found = vars(importlib.import_module(f"seqmodels.ops.{op}.op")).values()
        operators = [value for value in found if isinstance(value, Operator) and value.differentiable]
        if operators:
            result[op] = tuple(operators[0].modules)
    return result


def _arguments(console: Console, name: str) -> None:
    from seqmodels.models.arguments import default_arguments, layer_class

    cls = layer_class(name)
    table = Table("argument", "default", title=f"{name}: {describe(cls)}")
    for argument, default in default_arguments(cls).items():
        table.add_row(argument, "required" if default is ... else repr(default))
    console.print(table)
    console.print(inspect.getdoc(cls) or "", markup=False, highlight=False)
