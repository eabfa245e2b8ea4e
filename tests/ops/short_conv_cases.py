"""Inputs of the short-convolution tests, and rounding-error bounds derived from the definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import seqmodels
from seqmodels import Layout
from seqmodels.ops.short_conv import short_conv

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # relative error of one rounding
SILU_SLOPE = 1.1  # max |d silu / dz| is 1.0998
SILU_CURVATURE = 0.5  # max |d2 silu / dz2| is 1/2, at 0
# Relative error of z sigmoid(z) and of its derivative as computed: exp within 2 ulp (csrc/cpu/vec.h, libm),
# one addition, one division, up to four products.
SILU_ROUNDINGS = 12

GRIDS: dict[str, tuple[int, int, Layout | None]] = {
    "one token": (2, 1, None),
    "two tokens": (2, 2, None),
    "three tokens": (1, 3, None),
    "odd": (3, 37, None),
    "over a tile": (1, 261, None),
    "packed": (3, 40, Layout.packed([[3, 1, 30], [2], [17, 23]], 40, capacity=8)),
    "packed over a tile": (1, 300, Layout.packed([[131, 5, 129]], 300)),
    "left padded": (3, 20, Layout.left_padded([3, 20, 1])),
}


@dataclass
class Case:
    """Inputs and output gradients in one dtype; ``tensors`` are x, weight, bias, initial state."""

    name: str
    tensors: list[Tensor | None]
    grads: list[Tensor]
    layout: Layout | None
    activation: str | None


def cases(width: int, channels: int, dtype: torch.dtype, grids: dict | None = None) -> Iterator[Case]:
    """Every grid, with and without state, bias and SiLU. Values are exact in ``dtype``."""
    for (name, (batch, length, layout)), initial, bias, activation in itertools.product(
        (grids or GRIDS).items(), (False, True), (False, True), (None, "silu")
    ):
        documents = batch if layout is None else layout.num_documents
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(batch, length, channels).to(dtype)
        if layout is not None:
            x[~layout.valid] = float("nan")  # nobody may read padding
        tensors = [
            x,
            torch.randn(channels, width).to(dtype),
            torch.randn(channels).to(dtype) if bias else None,
            torch.randn(documents, width - 1, channels).to(state_dtype) if initial else None,
        ]
        grad_final = torch.randn(documents, width - 1, channels).to(state_dtype)
        grads = [torch.randn(batch, length, channels).to(dtype), grad_final]
        yield Case(f"{name}, state={initial}, bias={bias}, {activation}", tensors, grads, layout, activation)


def run(case: Case, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name; ``dtype`` converts the inputs first (float64 for the truth)."""
    convert = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
    leaves = [None if t is None else convert(t).clone().requires_grad_() for t in case.tensors]
    grads = [convert(grad) for grad in case.grads]
    with seqmodels.backend(backend):
        y, final = short_conv(*leaves[:3], initial_state=leaves[3], activation=case.activation, layout=case.layout)
        wanted = {name: t for name, t in zip(("x", "weight", "bias", "state"), leaves, strict=True) if t is not None}
        found = torch.autograd.grad([y, final], list(wanted.values()), grads)
    result = {"y": y.detach(), "final_state": final.detach()}
    return result | {f"grad_{name}": grad for name, grad in zip(wanted, found, strict=True)}


def bounds(case: Case, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far a result computed in float32 from these inputs may be from ``truth``, element by element.

    A sum of n products in any order errs by at most (n + 1) u sum |a b| (u: the relative error of one rounding),
    to first order in u; a factor of 1.01 covers the rest. z errs like that; SiLU has slope and curvature
    bounded; what leaves the op is rounded once more to its own dtype. The sums |a| |b| come from running
    the op, without SiLU, on absolute values.
    """
    x, weight = case.tensors[0], case.tensors[1]
    assert x is not None
    assert weight is not None
    width, tokens, u = weight.shape[1], x.shape[0] * x.shape[1], UNIT[torch.float32]
    silu = case.activation == "silu"
    absolute = Case("", [None if t is None else t.double().abs() for t in case.tensors], case.grads, case.layout, None)
    error_z = (width + 2) * u * run(absolute, "reference")["y"]
    error = {"y": SILU_SLOPE * error_z + SILU_ROUNDINGS * u * truth["y"].abs() if silu else error_z}
    error["final_state"] = torch.zeros_like(truth["final_state"])

    # g = grad_y silu'(z): its size and its error, then the sums over taps or tokens that use it.
    grad_y = case.grads[0].double().abs()
    g = SILU_SLOPE * grad_y if silu else grad_y
    error_g = grad_y * (SILU_CURVATURE * error_z + SILU_ROUNDINGS * u * SILU_SLOPE) if silu else torch.zeros_like(g)
    grad_final = case.grads[1].double().abs()
    terms = {"grad_x": width + 2, "grad_state": width + 2, "grad_weight": tokens + 1, "grad_bias": tokens + 1}
    absolute.grads = [g, grad_final]
    sums = run(absolute, "reference")
    absolute.grads = [error_g, torch.zeros_like(grad_final)]
    carried = run(absolute, "reference")
    error |= {key: terms[key] * u * sums[key] + carried[key] for key in sums if key in terms}
    dtypes = {"y": x.dtype, "grad_x": x.dtype, "grad_weight": weight.dtype, "grad_bias": weight.dtype}
    return {
        key: 1.01 * value + (UNIT[dtypes[key]] * truth[key].abs() if key in dtypes else 0.0)
        for key, value in error.items()
    }


def check(case: Case, result: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Every element of every output and gradient within its bound."""
    allowed = bounds(case, truth)
    assert result.keys() == truth.keys()
    for key, value in result.items():
        assert value.shape == truth[key].shape, (case.name, key)
        excess = (value.double() - truth[key]).abs() - allowed[key]
        assert not torch.isnan(value).any(), f"{case.name}: {key} has NaN"
        assert not (excess > 0).any(), f"{case.name}: {key} exceeds its bound by {excess.max():.3g}"
