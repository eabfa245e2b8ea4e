"""The PTD solver: its gradient, its eigensystems, what it accepts, and how results are stored."""

from __future__ import annotations

import math

import pytest
import torch

from seqmodels.init import (
    PerturbationNotFound,
    Settings,
    legs,
    perturbed_legs,
    ptd,
    random_perturbation,
    solve,
    storage,
)
from seqmodels.init.perturbation import perturbed
from seqmodels.init.settings import default_settings

SHIPPED = (2, 8, 16, 32, 64, 128)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_against_finite_differences(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size = 6
    a, _ = legs(size)
    perturbation = 0.1 * torch.randn(size, size, dtype=dtype)
    _, gradient = ptd.objective(perturbation, a, 3.0)
    assert gradient.dtype == dtype
    for _ in range(5):
        direction = torch.randn(size, size, dtype=dtype)
        step = 1e-6
        plus, minus = (ptd.objective(perturbation + s * step * direction, a, 3.0)[0] for s in (1, -1))
        slope = float((gradient.conj() * direction).sum().real)
        assert (plus - minus) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("size", SHIPPED)
def test_shipped_solutions(size: int) -> None:
    entry = storage.load(storage.shipped_path(size), size)
    assert entry is not None
    assert entry.settings == default_settings(size)
    found = perturbed_legs(size)
    assert found.largest_real_part < 0
    assert found.error <= entry.settings.target_error
    a, _ = legs(size)
    rebuilt = found.vectors @ torch.diag(found.eigenvalues) @ found.inverse
    scale = float(torch.linalg.matrix_norm(a, 2))
    assert float((rebuilt - (a + found.perturbation)).abs().max()) < 1e-12 * scale * max(1, found.condition / 10)
    torch.testing.assert_close(torch.linalg.vector_norm(found.vectors, dim=0), torch.ones(size, dtype=torch.float64))
    # Real E: the spectrum is closed under conjugation.
    torch.testing.assert_close(
        found.eigenvalues.imag.sort().values, (-found.eigenvalues.imag).sort().values, rtol=0, atol=1e-9 * scale
    )


def test_solver_finds_the_optimum_from_another_seed() -> None:
    """N = 8 at weight 25 has one optimum: kappa 7.629456, size .030982. A shorter descent comes near it."""
    found = solve(8, Settings(weight=25.0, steps=1500, starts=1, seed=11))
    shipped = perturbed_legs(8)
    assert ptd.objective_of(found, 25.0) == pytest.approx(ptd.objective_of(shipped, 25.0), abs=5e-3)
    assert found.condition == pytest.approx(7.629456, rel=2e-2)
    assert found.relative_size == pytest.approx(0.030982, rel=2e-2)


def test_target_that_no_start_meets() -> None:
    with pytest.raises(PerturbationNotFound, match="Raise target_error, weight") as caught:
        solve(32, Settings(steps=5, starts=2, target_error=1e-9))
    assert caught.value.best.error > 1e-9
    assert f"{caught.value.best.error:.3g}" in str(caught.value)


def test_error_is_the_distance_of_transfer_functions() -> None:
    found = perturbed_legs(16)
    a, b = legs(16)
    w = torch.linspace(-60, 60, 4001, dtype=torch.float64)
    shifted = 1j * w[:, None, None] * torch.eye(16, dtype=torch.float64)
    gain = torch.linalg.solve(shifted - a - found.perturbation, b.to(torch.complex128).expand(4001, -1))[:, 0]
    distance = float((gain - 1 / (1 + 1j * w)).abs().max())
    assert distance == pytest.approx(found.error, rel=1e-3)


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_random_perturbation_keeps_the_bound(size: float) -> None:
    """sup |C (G - G_LegS)| <= (2 ln N + 4) ||E||_2 for B and C of unit norm."""
    n = 32
    found = random_perturbation(n, size, seed=3, norm="spectral")
    a, b = legs(n)
    spectral = float(torch.linalg.matrix_norm(found.perturbation, 2))
    assert spectral == pytest.approx(size * float(torch.linalg.matrix_norm(a, 2)), rel=1e-12)
    assert found.error / float(b.norm()) <= (2 * math.log(n) + 4) * spectral


def test_what_is_no_perturbation() -> None:
    with pytest.raises(ValueError, match="expected a square matrix"):
        perturbed(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32 eigenvectors"):
        perturbed(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="not finite"):
        perturbed(torch.full((3, 3), float("nan"), dtype=torch.float64))
    with pytest.raises(ValueError, match="relative_size is 0"):
        random_perturbation(8, 0)
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        random_perturbation(8, 0.1, norm="l1")
    for settings in (Settings(weight=0), Settings(steps=0), Settings(target_error=-1)):
        with pytest.raises(ValueError, match="expected a positive"):
            solve(4, settings)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path))
    ptd._perturbed_legs.cache_clear()
    yield tmp_path
    ptd._perturbed_legs.cache_clear()


def test_cache_in_the_users_folder(cache, monkeypatch) -> None:
    settings = Settings(weight=25.0, steps=300, starts=1)
    first = perturbed_legs(6, settings)
    path = storage.cached_path(6, settings)
    assert path.is_relative_to(cache)
    assert path.exists()
    ptd._perturbed_legs.cache_clear()
    monkeypatch.setattr(ptd, "solve", lambda *_: pytest.fail("solved again"))
    again = perturbed_legs(6, settings)
    assert torch.equal(again.perturbation, first.perturbation)


def test_damaged_file_is_named_and_left_alone(cache) -> None:
    settings = Settings(weight=25.0, steps=10, starts=1)
    path = storage.cached_path(6, settings)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"is damaged.*delete it"):
        perturbed_legs(6, settings)
    assert path.read_bytes() == b"not a file of tensors"
    storage.save_entry(path, torch.zeros(5, 5, dtype=torch.float64), settings)
    with pytest.raises(ValueError, match=r"holds a matrix of \(5, 5\); expected \(6, 6\)"):
        perturbed_legs(6, settings)
