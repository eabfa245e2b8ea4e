"""The systems that are compared, as sums of modes G(s) = sum_n residue_n / (s - eigenvalue_n)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.init import PerturbedLegS, legs, legs_normal

F64 = torch.float64


class Modes(NamedTuple):
    """eigenvalues (n,), and residues (rows, n): row k is the output basis vector e_k times V, times V^-1 B."""

    eigenvalues: Tensor
    residues: Tensor

    def gain(self, frequencies: Tensor, rows: slice = slice(0, 1)) -> Tensor:
        """G(i w) for each row and frequency."""
        return torch.einsum("rn,fn->rf", self.residues[rows], 1 / (1j * frequencies[:, None] - self.eigenvalues))

    def impulse(self, times: Tensor) -> Tensor:
        """Response of the first row to an impulse."""
        return (torch.exp(times[:, None] * self.eigenvalues) @ self.residues[0]).real

    def step(self, times: Tensor) -> Tensor:
        """Response of the first row to a unit step."""
        return (torch.expm1(times[:, None] * self.eigenvalues) @ (self.residues[0] / self.eigenvalues)).real

    def sampled_gain(self, frequencies: Tensor, dt: float) -> Tensor:
        """|G| of the first row after zero-order hold: sum residue (e^z - 1) / lambda / (e^{i w dt} - e^z)."""
        z = dt * self.eigenvalues
        held = self.residues[0] * torch.expm1(z) / self.eigenvalues
        turn = torch.exp(1j * dt * frequencies.to(torch.complex128))
        return (held / (turn[:, None] - torch.exp(z))).sum(-1).abs()


@functools.cache
def s4d(size: int) -> Modes:
    """S4D-LegS with B / 2: the eigensystem of the normal part alone, conjugates included."""
    normal = legs_normal(size)
    half = normal.vectors * (0.5 * normal.b)
    eigenvalues = torch.complex(torch.full_like(normal.frequencies, -0.5), normal.frequencies)
    return Modes(torch.cat((eigenvalues, eigenvalues.conj())), torch.cat((half, half.conj()), 1))


def ptd(found: PerturbedLegS) -> Modes:
    return Modes(found.eigenvalues, found.vectors * found.input_vector())


def exact_gain(size: int, frequencies: Tensor) -> Tensor:
    """(size, frequencies): (i w - A)^-1 B of LegS, by solving."""
    a, b = legs(size)
    shifted = 1j * frequencies[:, None, None] * torch.eye(size, dtype=F64) - a
    return torch.linalg.solve(shifted, b.to(torch.complex128).expand(len(frequencies), -1)).T
