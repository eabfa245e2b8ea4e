"""Memory with guard pages: kernels that read or write outside their tensors are found, on a GPU or interpreted.

Every tensor that is made inside a :class:`GuardedMemory` block lies between two pages of bytes 0xFF, which
is NaN in every floating-point type and -1 in every integer type; uninitialised tensors hold the same. A
read out of bounds brings NaN into the results, a write out of bounds changes a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

PAGE = 4096  # bytes on either side; a multiple of every alignment that kernels ask for
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_FILLED = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "ones", "ones_like", "clone")
Value = TypeVar("Value")


class GuardedMemory(TorchDispatchMode):
    """Guards what ``torch.empty`` and its kin make inside the block; :meth:`check` says what was violated.

    >>> with GuardedMemory() as memory:
    ...     y = kernel(*memory.copy(arguments))
    >>> memory.check()
    """

    def __init__(self) -> None:
        super().__init__()
        self._pages: list[tuple[str, Tensor, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(made, Tensor) and name in _EMPTY + _FILLED and made.layout == torch.strided:
            return self._guard(made, f"a tensor made by {name}", fill=name in _FILLED)
        return made

    def copy(self, values: Value) -> Value:
        """The tensors of a nested structure, copied between guard pages; strides are kept."""
        return pytree.tree_map_only(Tensor, lambda tensor: self._guard(tensor, "an argument", fill=True), values)

    def _guard(self, tensor: Tensor, what: str, *, fill: bool) -> Tensor:
        with _disable_current_modes():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            used = 0 if tensor.numel() == 0 else extent * tensor.element_size()
            padded = -(-used // 16) * 16
            raw = torch.full((2 * PAGE + padded,), 255, dtype=torch.uint8, device=tensor.device)
            self._pages.append((f"{what} of shape {tuple(tensor.shape)}, {tensor.dtype}", raw, used))
            inner = raw[PAGE : PAGE + padded].view(tensor.dtype)
            guarded = inner.as_strided(tensor.shape, tensor.stride())
            if fill:
                guarded.copy_(tensor.detach())
            return guarded

    def check(self) -> None:
        """Raises AssertionError for the first tensor whose surroundings were written to."""
        for what, raw, used in self._pages:
            for side, page in (("before", raw[:PAGE]), ("behind", raw[PAGE + used :])):
                changed = (page != 255).nonzero()
                if len(changed):
                    first = int(changed[0]) - (PAGE if side == "before" else 0)
                    raise AssertionError(f"written out of bounds: {abs(first)} bytes {side} {what}")


def run_guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` on guarded copies, checked; its results come back on ordinary memory.

    Raises:
        AssertionError: a write out of bounds, or a result that is not finite: a read out of bounds
            or of memory that nobody wrote (the arguments must be finite themselves).
    """
    memory = GuardedMemory()
    with memory:
        results = function(*memory.copy(arguments))
    memory.check()
    for number, tensor in enumerate(pytree.tree_leaves(results)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise AssertionError(
                f"result {number} of shape {tuple(tensor.shape)} is not finite: something was read out of bounds "
                "or before it was written"
            )
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), results)
