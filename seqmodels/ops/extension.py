"""The compiled extension (``csrc/``): is it here, does it load, and if not, why.

``torch.ops.seqmodels_cpu`` exists after :func:`load`, ``torch.ops.seqmodels_cuda`` after a
successful :func:`missing_cuda`. Nothing else in the library loads them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

HOW = (
    "build it with `make install` in a clone, or `pip install --no-build-isolation .` "
    "with torch >= 2.11 and a C++17 compiler present"
)
COST = "ops run in plain PyTorch: the same results, several times slower, most of all in decoding"


@functools.cache
def load() -> str | None:
    """Loads the CPU kernels; returns why it cannot be, or None on success."""
    return _load("_C", "the C++ extension")


def missing_cpu() -> str | None:
    return load()


@functools.cache
def missing_cuda() -> str | None:
    """Why the kernels of ``csrc/cuda`` cannot be used, or None. Ops ask in their ``supports``."""
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    reason = _load("_CUDA", "the CUDA extension")
    return reason if reason is None else f"{reason}; it needs SEQMODELS_CUDA=1 and nvcc on the path when it is built"


def _load(stem: str, description: str) -> str | None:
    folder = Path(__file__).resolve().parent.parent
    libraries = sorted(folder.glob(f"{stem}.*"))
    if not libraries:
        return f"{description} is not built ({COST}); {HOW}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        cause = error.__cause__ or error
        return f"{description} at {libraries[0]} does not load ({cause}; {COST}); {HOW}"
    return None


def capability_name() -> str:
    """The instruction set that the C++ kernels use here: ``default``, ``avx2`` or ``avx512``."""
    reason = load()
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.seqmodels_cpu.capability()


@contextlib.contextmanager
def capability(name: str) -> Iterator[None]:
    """Runs the C++ kernels inside the block at a lower instruction set, for the whole process.

    ``SEQMODELS_CPU_CAPABILITY`` does the same from outside. RuntimeError: the machine lacks it.
    """
    previous = capability_name()
    torch.ops.seqmodels_cpu.set_capability(name)
    try:
        yield
    finally:
        torch.ops.seqmodels_cpu.set_capability(previous)
