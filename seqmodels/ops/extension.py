"""The compiled extension (``csrc/``): is it here, does it load, and if not, why.

``torch.ops.seqmodels_cpu`` and ``torch.ops.seqmodels_cuda`` exist after :func:`load`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

HOW = (
    "build it with `make install` in a clone, or `pip install --no-build-isolation .` "
    "with torch >= 2.11 and a C++17 compiler present"
)


@functools.cache
def load() -> str | None:
    """Loads the extension; returns why it cannot be, or None on success."""
    folder = Path(__file__).resolve().parent.parent
    libraries = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    if not libraries:
        return f"the C++ extension is not built; {HOW}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the C++ extension at {libraries[0]} does not load ({error}); {HOW}"
    return None


def missing_cpu() -> str | None:
    return load()


def missing_cuda() -> str | None:
    reason = load()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if not hasattr(torch.ops.seqmodels_cuda, "built"):
        return f"the extension was built without CUDA; set SEQMODELS_CUDA=1 with nvcc on the path and {HOW}"
    return None
