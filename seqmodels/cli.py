"""The ``seqmodels`` command line.

Each module ``seqmodels/commands/<name>.py`` is one command: it defines a function ``command`` (a
Typer command), or a Typer application ``app`` with commands of its own, and the first line of its
docstring is its line in ``seqmodels --help``. A module is imported when its command runs, and only
then: help does not wait for torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

FOLDER = Path(__file__).parent / "commands"


class _Commands(TyperGroup):
    """Commands listed from file names and docstrings, imported when they run."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:
        """A placeholder that carries the help line; :meth:`resolve_command` gives the command itself."""
        if cmd_name not in self.list_commands(ctx):
            return None
        text = ast.get_docstring(ast.parse(_module_path(cmd_name).read_text(encoding="utf-8"))) or ""
        return TyperCommand(cmd_name, help=text.partition("\n")[0])

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, TyperCommand | None, list[str]]:
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"unknown command {name!r}.{hint} Commands: {', '.join(known)}")
        return name, _load(name), args[1:]


def _module_path(name: str) -> Path:
    return FOLDER / f"{name.replace('-', '_')}.py"


def _load(name: str) -> Any:
    module: Any = importlib.import_module(f"seqmodels.commands.{name.replace('-', '_')}")
    if hasattr(module, "app"):
        return typer.main.get_group(module.app)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=(module.command.__doc__ or module.__doc__))(module.command)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_Commands,
    help="State-space and efficient sequence models: train, generate, evaluate, inspect.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    """Runs the command line; errors that a user can put right are one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is RuntimeError:
            raise
        print(f"seqmodels: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
