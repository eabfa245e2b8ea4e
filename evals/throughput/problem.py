"""A case in words, and the problem that it becomes on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MODES = ("forward", "forward+backward", "prefill", "decode")


@dataclass(frozen=True)
class Case:
    """What to measure, as plain data: ``config`` of every row that comes of it.

    Attributes:
        kind: ``op``, ``layer`` or ``model``.
        layer: name of the op, registry name of the layer, or name of the model.
        mode: forward, forward+backward, prefill (a forward that returns the state), decode (one step).
        dtype: of inputs and parameters.
        batch, length: length is the position of the step in decode mode.
        sizes: what else the builder needs: heads, widths.
        series: cases that differ in length only share one; slopes are fitted over it.
        priority: lower runs earlier.
        rivals: False leaves rivals and slower backends out (lengths that only serve a slope).
    """

    kind: str
    layer: str
    mode: str
    dtype: str
    batch: int
    length: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    priority: int = 1
    rivals: bool = True

    @property
    def series(self) -> str:
        sizes = ",".join(f"{name}{value}" for name, value in self.sizes.items())
        return f"{self.kind}:{self.layer}/{self.mode}/{self.dtype}/B{self.batch}" + (f"/{sizes}" if sizes else "")

    @property
    def name(self) -> str:
        return f"{self.series}/L{self.length}"

    @property
    def config(self) -> dict[str, Any]:
        names = ("kind", "layer", "mode", "dtype", "batch", "length")
        return {**{name: getattr(self, name) for name in names}, **self.sizes, "series": self.series}

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass
class Contestant:
    """One way to run a problem.

    Attributes:
        name: the backend for this library's own, the rival's name otherwise.
        run: maps one input set to outputs (and, in forward+backward mode, gradients).
        ours: of this library.
        same_function: False for another function of the same shapes, such as softmax attention beside
            linear attention: it is timed, not checked.
        omits: what the rival leaves out of the computation.
    """

    name: str
    run: Callable[[Any], Any]
    ours: bool = False
    same_function: bool = True
    omits: str = ""


class Cost(NamedTuple):
    """Least work of one run: multiply and add operations, bytes that must move, tokens produced."""

    flops: float
    bytes: float
    tokens: int


@dataclass
class Problem:
    """A case on a device.

    Attributes:
        inputs: ``inputs(seed)``: one set of random inputs.
        check: ``check(contestant) -> (error, bound)`` against float64.
        state_bytes: exact bytes that decoding carries at this length, where there is a state.
        skipped: rivals that are not here or broken, and why.
    """

    inputs: Callable[[int], Any]
    contestants: list[Contestant]
    check: Callable[[Contestant], tuple[float, float]]
    cost: Cost
    state_bytes: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error in the Euclidean norm; infinite where a value is not finite or a shape differs."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        difference = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)
        worst = max(worst, difference.item() if difference.isfinite() else float("inf"))
    return worst


def bound_from(definition_error: float, plain_error: float = 0.0, dtype: torch.dtype = torch.float32) -> float:
    """Largest error that is still called right.

    Four times what the definition itself, or the plain PyTorch form with its matrix products in the same
    dtype, loses in that dtype, plus what reordering float32 sums costs, plus 4 eps of the dtype: a kernel on
    matrix units rounds operands (weights, scores, states, gradients; up to 8 of them on the way, by eps / 2 each)
    that those two may keep in float32. A plain form that is itself wrong (5% and more) does not widen the bound.
    """
    plain_error = plain_error if plain_error < 0.05 else 0.0
    return 4 * max(definition_error, plain_error) + 32 * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []
