"""HiPPO-LegS and the diagonal matrices of S4D, in float64 on the CPU."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.configuration import nearest

_F64 = {"dtype": torch.float64, "device": "cpu"}  # also inside torch.device("meta")


def check_size(owner: str, size: int, *, even: bool = False) -> None:
    """Refuses a state size that is not a positive integer or, with ``even``, has no conjugate pairs."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{owner}: size is {size!r}; expected a positive integer")
    if even and size % 2:
        raise ValueError(
            f"{owner}: size is {size}; expected an even number, since states come in conjugate pairs "
            f"({size - 1} or {size + 1} would do)"
        )


def legs(size: int) -> tuple[Tensor, Tensor]:
    r"""HiPPO-LegS, x' = A x + B u:

    .. code-block:: text

        A[n, k] = -sqrt((2n + 1)(2k + 1)) for n > k,   -(n + 1) for n = k,   0 for n < k
        B[n] = sqrt(2n + 1)

    Gu et al., "HiPPO: recurrent memory with optimal polynomial projections", theorem 2.

    Returns:
        A (size, size) and B (size,).
    """
    check_size("legs", size)
    b = torch.sqrt(2 * torch.arange(size, **_F64) + 1)
    return -torch.tril(torch.outer(b, b), -1) - torch.diag(torch.arange(1, size + 1, **_F64)), b


def legs_low_rank(size: int) -> Tensor:
    """P (size,) with A + P P^T normal: P[n] = sqrt(n + 1/2) = B[n] / sqrt(2)."""
    check_size("legs_low_rank", size)
    return torch.sqrt(torch.arange(size, **_F64) + 0.5)


class NormalLegS(NamedTuple):
    """The eigensystem of A + P P^T = -I/2 + (a real skew-symmetric matrix), one of each conjugate pair.

    Attributes:
        frequencies: (size / 2,) positive, ascending; the eigenvalues are -1/2 +- i frequencies.
        vectors: (size, size / 2) complex, orthonormal columns; the first row is real and positive,
            which fixes the phase that is free in each eigenvector.
        b: (size / 2,) complex, V^H B.
    """

    frequencies: Tensor
    vectors: Tensor
    b: Tensor


@functools.cache
def legs_normal(size: int) -> NormalLegS:
    """Eigensystem of the normal part of LegS, by a Hermitian eigendecomposition.

    Raises:
        ValueError: an odd size.
    """
    check_size("legs_normal", size, even=True)
    a, b = legs(size)
    p = legs_low_rank(size)
    skew = a + torch.outer(p, p) + 0.5 * torch.eye(size, **_F64)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    half = size // 2
    vectors = canonical_phase(vectors[:, half:])
    return NormalLegS(frequencies[half:].clone(), vectors, vectors.mH @ b.to(vectors.dtype))


def canonical_phase(vectors: Tensor) -> Tensor:
    """Columns turned so that their first entry is real and not negative (their own where it is zero)."""
    first = vectors[0]
    turn = torch.where(first.abs() > 0, first.conj() / first.abs().clamp_min(1e-300), torch.ones_like(first))
    return vectors * turn


class DiagonalSystem(NamedTuple):
    """A diagonal SSM to start from.

    Attributes:
        a: (modes,) complex.
        b: (modes,) complex.
        paired: each mode stands for itself and its conjugate, so that outputs are 2 Re(C x).
    """

    a: Tensor
    b: Tensor
    paired: bool


def _legs(size: int, b_half: bool, b_clip: float | None) -> DiagonalSystem:
    normal = legs_normal(size)
    b = 0.5 * normal.b if b_half else normal.b
    if b_clip is not None:
        b = torch.complex(b.real, b.imag.clamp(-b_clip, b_clip))
    return DiagonalSystem(torch.complex(torch.full_like(normal.frequencies, -0.5), normal.frequencies), b, True)


def _frequencies(imaginary: Tensor) -> DiagonalSystem:
    a = torch.complex(torch.full_like(imaginary, -0.5), imaginary)
    return DiagonalSystem(a, torch.ones_like(a), True)


DIAGONAL_INITS = ("legs", "inv", "lin", "real")


def diagonal_system(init: str, size: int, *, b_half: bool = False, b_clip: float | None = None) -> DiagonalSystem:
    r"""The initial A and B of S4D, for N = ``size`` counting conjugates and n < N / 2:

    .. code-block:: text

        legs   A[n] = -1/2 + i w[n]  (eigenvalues of A_LegS + P P^T)     B = V^H B_LegS
        inv    A[n] = -1/2 + i (N / pi) (N / (2n + 1) - 1)               B = 1
        lin    A[n] = -1/2 + i pi n                                      B = 1
        real   A[n] = -(n + 1), n < N, no conjugates                     B = 1

    Section 4 of Gu, Gupta, Goel and Ré, "On the parameterization and initialization of diagonal
    state space models".

    Args:
        init: one of the names above.
        size: N, even but for ``real``.
        b_half: legs with B / 2, which the convergence theorem is about. The published experiments
            leave the factor out.
        b_clip: legs with Im B cut to [-b_clip, b_clip]; the published experiments use 2.

    Raises:
        ValueError: an unknown name, an odd size where modes are paired, or a negative b_clip.
    """
    if init not in DIAGONAL_INITS:
        raise ValueError(f"unknown init {init!r}.{nearest(init, DIAGONAL_INITS)} Known: {', '.join(DIAGONAL_INITS)}")
    if b_clip is not None and not b_clip > 0:
        raise ValueError(f"b_clip is {b_clip!r}; expected a positive number, or None for no clipping")
    check_size(f"init {init!r}", size, even=init != "real")
    if init == "legs":
        return _legs(size, b_half, b_clip)
    if init == "real":
        a = torch.complex(-torch.arange(1, size + 1, **_F64), torch.zeros(size, **_F64))
        return DiagonalSystem(a, torch.ones_like(a), False)
    n = torch.arange(size // 2, **_F64)
    return _frequencies(math.pi * n if init == "lin" else size / math.pi * (size / (2 * n + 1) - 1))
