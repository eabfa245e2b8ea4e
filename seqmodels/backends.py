"""Which implementation of an op runs: ``reference``, ``torch``, ``cpu``, ``triton``, ``cuda`` or ``auto``.

* ``reference``: the definition, token by token, any dtype; slow.
* ``torch``: the chunked form in plain PyTorch, any device.
* ``cpu``: C++ kernels (the compiled extension).
* ``triton``: Triton kernels on a GPU (or the CPU interpreter).
* ``cuda``: CUDA C++ kernels (the extension built with nvcc), and CUDA peers where installed.

``auto`` takes the fastest that is there for the tensors' device and says once, through
``logging``, what it took. A backend asked for by name never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
logger = logging.getLogger("seqmodels")


class BackendUnavailable(RuntimeError):
    """A backend asked for by name is missing here, or cannot take these arguments."""


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected 'auto' or one of {', '.join(BACKENDS)}")
    return name


_requested = _check_name(os.environ.get("SEQMODELS_BACKEND") or "auto", "SEQMODELS_BACKEND")


def requested_backend() -> str:
    """The backend in force: ``"auto"`` unless :func:`backend` or ``SEQMODELS_BACKEND`` says otherwise."""
    return _requested


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on backend ``name`` (for the whole process, backward included
    when it was recorded inside)."""
    global _requested
    previous = _requested
    _requested = _check_name(name, "seqmodels.backend")
    try:
        yield
    finally:
        _requested = previous


@functools.cache
def missing(name: str) -> str | None:
    """Why backend ``name`` is not usable on this machine and how to get it, or None when it is."""
    if name in ("reference", "torch"):
        return None
    if name == "cpu":
        from seqmodels.ops import extension

        return extension.missing_cpu()
    if name == "cuda":  # what else it needs (our kernels, a peer's package) differs: each op's supports() says
        return None if torch.cuda.is_available() else "no GPU is visible to torch"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'triton>=3.6' (Linux; comes with a CUDA build of torch)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "no GPU is visible to torch; Triton kernels need one (TRITON_INTERPRET=1 interprets them on the CPU)"
    return None


def preference(device_type: str) -> tuple[str, ...]:
    """The order in which ``auto`` tries backends for tensors on a device."""
    if device_type == "cuda":
        return ("cuda", "triton", "torch", "reference")
    if device_type == "cpu":
        return ("cpu", "torch", "reference")
    return ("torch", "reference")


_warned: set[str] = set()


@functools.cache
def announce(op: str, device_type: str, taken: str, reasons: tuple[str, ...]) -> None:
    """Logs once per op and device what ``auto`` took, and why not a faster one.

    A warning the first time a reason comes up (one line for a missing extension, not one an op).
    """
    because = f" ({'; '.join(reasons)})" if reasons else ""
    level = logging.INFO if _warned.issuperset(reasons) else logging.WARNING
    _warned.update(reasons)
    logger.log(level, "%s on %s runs on backend %r%s", op, device_type, taken, because)
