"""Perturb-then-diagonalise (PTD): a small E for which A_LegS + E is well conditioned to diagonalise.

``python -m seqmodels.init --sizes 2 8 16`` makes the files that ship with the package.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from seqmodels.init import storage
from seqmodels.init.hippo import check_size, legs
from seqmodels.init.perturbation import PerturbedLegS, perturbed
from seqmodels.init.settings import Settings, check_settings, default_settings

logger = logging.getLogger("seqmodels")


class PerturbationNotFound(RuntimeError):
    """No start met the target. ``best`` is the one of smallest error (stable ones first)."""

    def __init__(self, message: str, best: PerturbedLegS) -> None:
        super().__init__(message)
        self.best = best


def objective(perturbation: Tensor, a: Tensor, weight: float) -> tuple[float, Tensor]:
    r"""Value and gradient of

    .. code-block:: text

        log kappa_2(V) + weight ||E||_F / ||A||_F,   A + E = V diag(lambda) V^-1, unit columns

    With V = U S W^H (singular values s_1 >= ... >= s_N), the gradient of log kappa to V is
    G = u_1 w_1^H / s_1 - u_N w_N^H / s_N, less its component along each column. A change of E moves
    V by V (F * (V^-1 dE V)) with F[i, j] = 1 / (lambda_j - lambda_i), hence with
    M = (V^H G) * conj(F), diag M = 0, the gradient to a real E is Re(V^-H M V^H).
    """
    eigenvalues, vectors = torch.linalg.eig(a + perturbation)
    left, singular, right = torch.linalg.svd(vectors)
    gradient = torch.outer(left[:, 0], right[0]) / singular[0] - torch.outer(left[:, -1], right[-1]) / singular[-1]
    gradient = gradient - vectors * (vectors.conj() * gradient).sum(0)
    gap = eigenvalues[None, :] - eigenvalues[:, None]
    gap.fill_diagonal_(1)
    inner = (vectors.mH @ gradient) / gap.conj()
    inner.fill_diagonal_(0)
    kappa_gradient = torch.linalg.solve(vectors.mH, inner) @ vectors.mH
    if not perturbation.is_complex():
        kappa_gradient = kappa_gradient.real
    size, scale = torch.linalg.matrix_norm(perturbation), weight / torch.linalg.matrix_norm(a)
    value = torch.log(singular[0] / singular[-1]) + scale * size
    return float(value), kappa_gradient + scale * perturbation / size.clamp_min(1e-300)


def descend(size: int, settings: Settings, seed: int) -> Tensor:
    """E (size, size) after one start of Adam."""
    a, _ = legs(size)
    uniform = torch.rand(size, size, dtype=a.dtype, device="cpu", generator=torch.Generator().manual_seed(seed))
    perturbation = torch.nn.Parameter(-settings.initial_size * size * uniform)
    optimizer = torch.optim.Adam([perturbation], lr=settings.learning_rate * size)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / settings.steps))
    for _ in range(settings.steps):
        _, perturbation.grad = objective(perturbation.detach(), a, settings.weight)
        optimizer.step()
        schedule.step()
    return perturbation.detach()


def solve(size: int, settings: Settings | None = None) -> PerturbedLegS:
    """Finds E for LegS of ``size`` states, from several starts (and E = 0, which wins where A is benign).

    A start is accepted when every eigenvalue has a negative real part and its transfer function is
    within ``settings.target_error``; of those the one of smallest objective is returned.

    Section 4 of Yu, Nigmetov, Morozov, Mahoney and Erichson, "Robustifying state-space models for long
    sequences via approximate diagonalization".

    Raises:
        ValueError: settings out of range.
        PerturbationNotFound: no start is accepted; the message has the best found and what to relax.
    """
    check_size("solve", size)
    settings = default_settings(size) if settings is None else settings
    check_settings(settings)
    a, _ = legs(size)
    candidates = [perturbed(torch.zeros_like(a))]
    for start in range(settings.starts):
        found = perturbed(descend(size, settings, settings.seed + start))
        logger.info(
            "PTD size %d start %d of %d: kappa %.3g, ||E||/||A|| %.3g, error %.3g, max Re lambda %.3g",
            size, start + 1, settings.starts, found.condition, found.relative_size, found.error,
            found.largest_real_part,
        )  # fmt: skip
        candidates.append(found)
    accepted = [one for one in candidates if one.largest_real_part < 0 and one.error <= settings.target_error]
    # Undiagonalisable LegS itself is no answer, however small its objective is where kappa overflows.
    accepted = [one for one in accepted if one.condition < 1e8]
    if not accepted:
        best = min(candidates[1:], key=lambda one: (one.largest_real_part >= 0, one.error))
        raise PerturbationNotFound(
            f"none of {settings.starts} starts for size {size} is stable with an error of at most "
            f"{settings.target_error}. The best has error {best.error:.3g}, max Re lambda "
            f"{best.largest_real_part:.3g}, kappa {best.condition:.3g}, ||E||/||A|| {best.relative_size:.3g}. "
            "Raise target_error, weight (a smaller E), starts or steps.",
            best,
        )
    return min(accepted, key=lambda one: objective_of(one, settings.weight))


def objective_of(found: PerturbedLegS, weight: float) -> float:
    """log kappa + weight ||E|| / ||A||."""
    return float(torch.tensor(found.condition).log()) + weight * found.relative_size


def perturbed_legs(size: int, settings: Settings | None = None) -> PerturbedLegS:
    """The PTD of LegS with ``size`` states: shipped, else from the user's cache, else solved and cached there.

    The cache folder is ``$SEQMODELS_CACHE``, else ``$XDG_CACHE_HOME/seqmodels``, else ``~/.cache/seqmodels``.
    Solving takes about 10 seconds for 64 states and minutes for 128.

    Raises:
        ValueError: a size or settings out of range, or a cached file that is damaged.
        PerturbationNotFound: see :func:`solve`.
    """
    check_size("perturbed_legs", size)
    return _perturbed_legs(size, default_settings(size) if settings is None else settings)


@functools.cache
def _perturbed_legs(size: int, settings: Settings) -> PerturbedLegS:
    for path in (storage.shipped_path(size), storage.cached_path(size, settings)):
        entry = storage.load(path, size)
        if entry is not None and entry.settings == settings:
            return perturbed(entry.perturbation)
    logger.warning(
        "no PTD of size %d with %s is stored; solving (seconds to minutes), then kept in %s",
        size, settings, storage.cached_path(size, settings).parent,
    )  # fmt: skip
    found = solve(size, settings)
    storage.save_entry(storage.cached_path(size, settings), found.perturbation, settings)
    return found
