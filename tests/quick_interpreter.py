"""Triton's interpreter without the part of its work that is done again at every call of a helper kernel.

A call of a ``@triton.jit`` function from another one walks all of ``triton.language`` for functions to replace by
interpreted ones, finds that the launch has replaced them already, and has then taken longer than what the helper
computes. Nothing is put back before the launch ends, so once a launch and set of modules is enough.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """Changes the interpreter of this process, if it has the parts that Triton 3.6 has; else it stays slow."""
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[frozenset[int]] | None = None  # modules patched by helpers of the launch; None outside one

    def patch_once(fn: Any) -> Any:
        nonlocal done
        if done is None:  # the launched kernel itself, whose changes the launch takes back
            done = set()
            return patch(fn)
        modules = frozenset(
            id(value)
            for value in fn.__globals__.values()
            if inspect.ismodule(value) and value in (interpreter.tl, interpreter.tl.core)
        )
        if modules in done:
            return interpreter._LangPatchScope()
        done.add(modules)
        return patch(fn)

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done = None
        try:
            return launch(self, *args, **kwargs)
        finally:
            done = None

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_once
