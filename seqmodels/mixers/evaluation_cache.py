"""Results that depend on parameters alone, kept between calls while no gradient is recorded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from seqmodels.backends import requested_backend

Value = TypeVar("Value")


class EvaluationCache:
    """One entry a name, valid while the parameters are the same tensors with the same version counters.

    In-place writes, optimiser steps, ``load_state_dict`` (also ``assign=True``) and moves of device or dtype
    are seen. A write through ``parameter.data`` is not, since it leaves the counter alone: call :meth:`clear`
    (layers do so in ``train()`` and ``eval()``).

    Nothing is kept while gradients are recorded, under ``torch.compile``, during the capture of a CUDA
    graph (whose memory is its own), under dispatch modes, or for parameters that are tensor subclasses. A
    copied or pickled cache is empty.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def clear(self) -> None:
        self._entries.clear()

    def get(
        self,
        name: str,
        parameters: Sequence[Tensor],
        key: Sequence[Hashable],
        compute: Callable[[], Value],
        *,
        serves: Callable[[Value], bool] = lambda value: True,
    ) -> Value:
        """The value under ``name`` if it was made from these parameters and ``key`` and ``serves``, else a new one."""
        if not usable(parameters):
            return compute()
        stamp = (*key, requested_backend(), *((p, p._version, p.data_ptr(), p.dtype) for p in parameters))
        found = self._entries.get(name)
        if found is not None and _same(found[0], stamp) and serves(found[1]):
            return found[1]
        value = compute()
        self._entries[name] = (stamp, value)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> EvaluationCache:
        return EvaluationCache()

    def __reduce__(self) -> tuple[type[EvaluationCache], tuple[()]]:
        return EvaluationCache, ()


def usable(parameters: Sequence[Tensor]) -> bool:
    """Whether results may be kept now (see :class:`EvaluationCache`)."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _get_current_dispatch_mode() is not None:
        return False
    if any(type(p) not in (nn.Parameter, Tensor) or p.is_inference() or p.is_meta for p in parameters):
        return False
    return not (parameters[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _same(stamp: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Equality with tensors compared by identity."""
    if len(stamp) != len(other):
        return False
    for a, b in zip(stamp, other, strict=True):
        if isinstance(a, tuple) and a and isinstance(a[0], Tensor):
            if a[0] is not b[0] or a[1:] != b[1:]:
                return False
        elif a != b:
            return False
    return True
