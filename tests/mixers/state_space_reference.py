"""Dense state-space systems in float64, discretised by matrix exponential or by solving: the layers' references."""

from __future__ import annotations

import torch
from torch import Tensor


def exponential(matrix: Tensor) -> Tensor:
    """e^M by its series at M / 2^k and k squarings (torch.matrix_exp of complex128 is off by 1e-10 and more)."""
    halvings = max(0, int(torch.linalg.matrix_norm(matrix, 1).log2().ceil()) + 3)
    small = matrix / 2**halvings
    total = term = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    for order in range(1, 20):
        term = term @ small / order
        total = total + term
    for _ in range(halvings):
        total = total @ total
    return total


def zero_order_hold(a: Tensor, b: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """exp(dt [[A, B], [0, 0]]) = [[A', B'], [0, 1]]."""
    size = a.shape[0]
    block = torch.zeros(size + 1, size + 1, dtype=torch.complex128)
    block[:size, :size], block[:size, size] = a, b
    whole = exponential(dt * block)
    return whole[:size, :size], whole[:size, size]


def bilinear(a: Tensor, b: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """(I - dt A / 2)^-1 (I + dt A / 2), dt (I - dt A / 2)^-1 B."""
    eye = torch.eye(a.shape[0], dtype=torch.complex128)
    a, b = a.to(torch.complex128), b.to(torch.complex128)
    return torch.linalg.solve(eye - dt / 2 * a, eye + dt / 2 * a), dt * torch.linalg.solve(eye - dt / 2 * a, b)


def run(a: Tensor, b: Tensor, c: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x <- A x + B u[t], y[t] = C x, for u (length,): (length,) complex and the last state."""
    outputs = []
    for value in u:
        state = a @ state + b * value
        outputs.append(c @ state)
    return torch.stack(outputs), state


def kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """C A^l B."""
    impulse = torch.zeros(length, dtype=torch.float64)
    impulse[0] = 1
    return run(a, b, c, impulse, torch.zeros_like(b))[0]
