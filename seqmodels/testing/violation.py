"""What a law raises, and how laws compare tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from seqmodels.state import State


class LawViolation(AssertionError):
    """A layer breaks a law. ``law`` is the law's name; the message says where, by how much, and the bound."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(f"{law} law: {message}")
        self.law = law
        self.message = message


class Violated(Exception):
    """Raised by the comparisons below; :func:`seqmodels.testing.subject.law` adds the law's name."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Violated(message)


def exact_bound(dtype: torch.dtype, length: int) -> float:
    """How far two orders of evaluation may lie apart, relative to the largest value compared.

    Both compute the same real numbers. Rounding errors of a sum of n terms grow like sqrt(n) eps
    when they are independent, times the operations one after the other in a layer (tens) and the
    condition of its divisions. In float64 the bound is 1e-10: 4.5e5 eps, room for any
    sensible conditioning, while a mistake of indexing moves results by 1e-3 and more. In float32
    there is less room between the two: 64 eps sqrt(length).
    """
    if dtype == torch.float64:
        return 1e-10
    return 64 * torch.finfo(dtype).eps * math.sqrt(length)


def scale_of(tensors: Mapping[str, Tensor]) -> float:
    """The largest magnitude in a group of tensors: gradients that vanish by symmetry are judged on
    the scale of their group, not on that of their own rounding noise."""
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.numel()]
    return max((tensor.detach().abs().max().item() for tensor in floating), default=0.0)


def max_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return (actual.detach().double() - expected.detach().double()).abs().max().item()


def check_close(where: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float) -> float:
    """Every tensor within ``relative`` times the largest value of the expected group; integers equal.

    Returns the worst error as a fraction of its bound.
    """
    require(
        actual.keys() == expected.keys(),
        f"{where}: the tensors are {sorted(actual)}; expected {sorted(expected)}",
    )
    bound, worst = relative * scale_of(expected), 0.0
    for name, wanted in expected.items():
        found = actual[name]
        require(
            found.shape == wanted.shape and found.dtype == wanted.dtype,
            f"{where}: {name} is {tuple(found.shape)} {found.dtype}; expected {tuple(wanted.shape)} {wanted.dtype}",
        )
        if not wanted.is_floating_point():
            require(torch.equal(found, wanted), f"{where}: {name} is {found.tolist()}; expected {wanted.tolist()}")
            continue
        error = max_error(found, wanted)
        if not error <= bound:  # also when the error is NaN
            raise Violated(f"{where}: {name} differs by {error:.3g}{_position(found, wanted)}; bound {bound:.3g}")
        worst = max(worst, error / bound if bound else 0.0)
    return worst


def _position(found: Tensor, wanted: Tensor) -> str:
    difference = (found.detach().double() - wanted.detach().double()).abs()
    if not torch.isfinite(difference).all():
        difference = torch.where(torch.isfinite(difference), 0.0, torch.inf)
    index = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    return f" at index {index}" if index else ""


def check_exactly_zero(where: str, gradient: Tensor) -> None:
    """No path at all: a gradient that is small but not zero is a leak."""
    if gradient.numel() == 0:
        return
    if not bool((gradient == 0).all()):
        bad = torch.nonzero(gradient != 0)[0].tolist()
        value = gradient[tuple(bad)].item()
        raise Violated(f"{where}: the gradient must be exactly zero; it is {value:.3g} at index {bad}")


def named(state: State | None) -> dict[str, Tensor]:
    """Tensors of a state by name, in canonical form; empty for a layer without state."""
    return {} if state is None else {f"state.{name}": tensor for name, tensor in state.canonical().tensors()}
