"""A perturbed LegS matrix, its eigensystem, and how far its transfer function is from the exact one."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.init.hippo import canonical_phase, check_size, legs


class PerturbedLegS(NamedTuple):
    r"""A_LegS + E = V diag(lambda) V^-1 in float64.

    Attributes:
        perturbation: E (size, size), real or complex.
        eigenvalues: (size,) complex, by ascending imaginary then real part.
        vectors: V (size, size) complex, columns of unit norm whose first entry is real and not negative.
        inverse: V^-1.
        condition: kappa_2(V).
        relative_size: Frobenius norm of E over that of A_LegS.
        error: sup over s on the imaginary axis of |G(s) - G_LegS(s)| with C = e_0 and the full B.
    """

    perturbation: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    inverse: Tensor
    condition: float
    relative_size: float
    error: float

    @property
    def order(self) -> int:
        """N, the number of states."""
        return self.eigenvalues.shape[0]

    def input_vector(self) -> Tensor:
        """V^-1 B of LegS: (size,) complex."""
        return self.inverse @ legs(self.order)[1].to(self.inverse.dtype)

    @property
    def largest_real_part(self) -> float:
        """max Re lambda; stable below zero."""
        return float(self.eigenvalues.real.max())


def perturbed(perturbation: Tensor) -> PerturbedLegS:
    """The eigensystem and the measures of A_LegS + E.

    Raises:
        ValueError: E that is not a square float64 or complex128 matrix of finite numbers.
    """
    if perturbation.dim() != 2 or perturbation.shape[0] != perturbation.shape[1]:
        raise ValueError(f"perturbation has shape {tuple(perturbation.shape)}; expected a square matrix")
    if perturbation.dtype not in (torch.float64, torch.complex128):
        raise ValueError(
            f"perturbation is {perturbation.dtype}; expected float64 or complex128 (float32 eigenvectors are not "
            "accurate enough)"
        )
    if not torch.isfinite(torch.view_as_real(perturbation.to(torch.complex128))).all():
        raise ValueError("perturbation holds values that are not finite")
    a, _ = legs(perturbation.shape[0])
    eigenvalues, vectors = torch.linalg.eig(a + perturbation)  # of a real matrix: conjugates are exact
    # Stable sorts by the two keys; rounding puts conjugates in one place for every LAPACK.
    order = torch.argsort(eigenvalues.real, stable=True)
    order = order[torch.argsort(eigenvalues.imag[order], stable=True)]
    eigenvalues, vectors = eigenvalues[order], canonical_phase(vectors[:, order])
    singular = torch.linalg.svdvals(vectors)
    relative_size = float(torch.linalg.matrix_norm(perturbation) / torch.linalg.matrix_norm(a))
    inverse = torch.linalg.inv(vectors)
    error = transfer_error(eigenvalues, vectors, inverse)
    condition = float(singular[0] / singular[-1])
    return PerturbedLegS(perturbation, eigenvalues, vectors, inverse, condition, relative_size, error)


def modal_transfer(eigenvalues: Tensor, residues: Tensor, frequencies: Tensor) -> Tensor:
    """G(i w) = sum_n residues[..., n] / (i w - eigenvalues[n]) for every w: (..., frequencies)."""
    return torch.einsum("...n,fn->...f", residues, 1 / (1j * frequencies[:, None] - eigenvalues))


def transfer_error(eigenvalues: Tensor, vectors: Tensor, inverse: Tensor) -> float:
    """sup over w of |G(i w) - 1 / (i w + 1)|: the transfer function of LegS from B to e_0 is 1 / (s + 1).

    The maximum is over a grid that is dense around every resonance.
    """
    size = eigenvalues.shape[0]
    residues = vectors[0] * (inverse @ legs(size)[1].to(inverse.dtype))
    grid = _frequencies(eigenvalues)
    error = modal_transfer(eigenvalues, residues, grid) - 1 / (1 + 1j * grid)
    return float(error.abs().max())


def _frequencies(eigenvalues: Tensor) -> Tensor:
    """Zero, +-[1e-3, 10 max|lambda|] log-spaced, and every resonance with its neighbourhood, ascending."""
    largest = float(eigenvalues.abs().max().clamp_min(1.0))
    spread = torch.logspace(-3, math.log10(10 * largest), 2000, dtype=torch.float64, device="cpu")
    near = torch.linspace(-4, 4, 81, dtype=torch.float64, device="cpu")
    peaks = eigenvalues.imag[:, None] + eigenvalues.real.abs()[:, None] * near
    grid = torch.cat((spread.new_zeros(1), spread, -spread, peaks.flatten()))
    return grid.sort().values


@functools.cache
def random_perturbation(
    size: int, relative_size: float, *, seed: int = 0, norm: str = "frobenius", real: bool = True
) -> PerturbedLegS:
    """LegS with a Gaussian (Ginibre) E of a given size: the ablation of the optimised perturbation.

    Args:
        size: N.
        relative_size: ||E|| / ||A_LegS||, positive.
        seed: of E's entries.
        norm: "frobenius" or "spectral", on both sides of the ratio.
        real: real E, whose spectrum is closed under conjugation.
    """
    check_size("random_perturbation", size)
    if not relative_size > 0:
        raise ValueError(f"random_perturbation: relative_size is {relative_size!r}; expected a positive number")
    orders = {"frobenius": "fro", "spectral": 2}
    if norm not in orders:
        raise ValueError(f"random_perturbation: unknown norm {norm!r}; expected frobenius or spectral")
    dtype = torch.float64 if real else torch.complex128
    entries = torch.randn(size, size, dtype=dtype, device="cpu", generator=torch.Generator().manual_seed(seed))
    a, _ = legs(size)
    scale = relative_size * torch.linalg.matrix_norm(a, orders[norm]) / torch.linalg.matrix_norm(entries, orders[norm])
    return perturbed(scale * entries)
