"""Finds every Triton kernel of the library, and those that nobody declared."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from seqmodels.ops.kernels import KernelSpec

ROOT = Path(__file__).resolve().parent.parent


class Found(NamedTuple):
    """What a set of modules holds.

    Attributes:
        kernels: declared kernels by name.
        problems: kernels nobody declared, names used twice, modules that do not import.
    """

    kernels: dict[str, KernelSpec]
    problems: list[str]


def kernel_modules() -> list[str]:
    """Import paths of every ``ops/*/triton*.py``."""
    files = sorted((ROOT / "ops").glob("*/triton*.py"))
    return [".".join(("seqmodels", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]


def discover(modules: list[str] | None = None) -> Found:
    """Imports ``modules`` (the library's own when None) and collects their ``KERNELS``.

    A module is an import path or a path to a ``.py`` file.

    A ``@triton.jit`` function is in order when a declaration names it, or a declared kernel calls
    it. Anything else would reach users without ever having been compiled here.
    """
    kernels: dict[str, KernelSpec] = {}
    problems: list[str] = []
    loaded: list[ModuleType] = []
    for name in kernel_modules() if modules is None else modules:
        try:
            module = _import(name)
        except Exception as error:  # one broken module must not hide the state of the others
            problems.append(f"{name} does not import: {type(error).__name__}: {error}")
            continue
        loaded.append(module)
        for spec in getattr(module, "KERNELS", ()):
            other = kernels.get(spec.name)
            if other is not None and other is not spec:
                problems.append(f"{name}: the name {spec.name!r} is taken by another kernel; names must be unique")
                continue
            kernels[spec.name] = spec
    if modules is None:
        problems.extend(misplaced())
    covered = _reachable([spec.function for spec in kernels.values()])
    for module in loaded:
        for name, function in sorted(vars(module).items()):
            if not _is_kernel(function) or _home(function) != module.__name__:
                continue
            if not _is_plain(function):
                problems.append(
                    f"{module.__name__}.{name} is wrapped by triton.{type(function).__name__.lower()}: it would be "
                    "timed or specialised at run time; declare its tiles in a KernelSpec instead"
                )
            elif id(function) not in covered:
                problems.append(
                    f"{module.__name__}.{name} is a kernel nobody registered: add a KernelSpec for it to KERNELS, "
                    "or call it from a kernel that has one"
                )
    return Found(kernels, problems)


def misplaced(root: Path = ROOT) -> list[str]:
    """Kernels outside ``ops/*/triton*.py``, where no audit would look for them."""
    found = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        if "triton" not in text or (len(where.parts) == 3 and where.match("ops/*/triton*.py")):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            plain = (item.func if isinstance(item, ast.Call) else item for item in node.decorator_list)
            if set(map(ast.unparse, plain)) & {"triton.jit", "triton.autotune", "triton.heuristics"}:
                found.append(f"{root.name}/{where}: kernel {node.name} belongs in {root.name}/ops/<op>/triton.py")
    return found


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    alias = f"_audited_{path.stem}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, path)
        if spec is None or spec.loader is None or not path.exists():
            raise ModuleNotFoundError(f"no file {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        spec.loader.exec_module(module)
    return sys.modules[alias]


def _is_kernel(value: Any) -> bool:
    return hasattr(value, "arg_names") and hasattr(value, "fn")


def _home(kernel: Any) -> str:
    """The module of the Python function at the bottom of a kernel's decorators."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel.__module__


def _is_plain(value: Any) -> bool:
    return inspect.isfunction(value.fn)


def _reachable(roots: list[Any]) -> set[int]:
    """Ids of the ``@triton.jit`` functions that ``roots`` call, directly or not, themselves included."""
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        function = pending.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        scope = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
        for node in ast.walk(ast.parse(function.src)):
            value = None
            if isinstance(node, ast.Name):
                value = scope.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(scope.get(node.value.id), node.attr, None)
            if value is not None and _is_kernel(value):
                pending.append(value)
    return seen
