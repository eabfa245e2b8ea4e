"""Inputs of the tests of the Vandermonde products."""

from __future__ import annotations

import torch
from torch import Tensor

import seqmodels
from seqmodels.ops.vandermonde import vandermonde, vandermonde_adjoint

# rows, heads, states, length: one time, powers of two, primes, several blocks of times, one state
SIZES = [(1, 2, 3, 1), (2, 3, 4, 2), (1, 3, 17, 37), (3, 2, 5, 64), (2, 2, 64, 131), (1, 1, 1, 1025), (5, 2, 20, 300)]


def exponents(heads: int, states: int, dtype: torch.dtype, rate: float = 0.05) -> Tensor:
    return torch.stack((-rate * torch.rand(heads, states), 100 * torch.randn(heads, states)), -1).to(dtype)


def inputs(size: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    rows, heads, states, length = size
    return {
        "z": exponents(heads, states, dtype),
        "weight": torch.randn(rows, heads, states, 2, dtype=dtype),
        "x": torch.randn(rows, heads, length, dtype=dtype),
        "kernel_grad": torch.randn(rows, heads, length, dtype=dtype),
        "state_grad": torch.randn(rows, heads, states, 2, dtype=dtype),
    }


def run(values: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Both products and their gradients by name, from inputs converted to ``dtype`` first."""
    given = {name: value.to(dtype or value.dtype).clone() for name, value in values.items()}
    z, weight, x = (given[name].requires_grad_() for name in ("z", "weight", "x"))
    with seqmodels.backend(backend):
        kernel = vandermonde(z, weight, x.shape[-1], scale=2.0)
        state = vandermonde_adjoint(z, x)
        grad_z, grad_weight = torch.autograd.grad(kernel, [z, weight], given["kernel_grad"])
        other_z, grad_x = torch.autograd.grad(state, [z, x], given["state_grad"])
    return {
        "kernel": kernel.detach(), "state": state.detach(), "grad_weight": grad_weight, "grad_z": grad_z,
        "grad_x": grad_x, "grad_z of state": other_z,
    }  # fmt: skip
