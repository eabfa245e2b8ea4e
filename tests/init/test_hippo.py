"""LegS, its normal part and S4D's diagonal systems. Reference values: tests/evals/test_long_range_theory.py."""

from __future__ import annotations

import pytest
import torch

from seqmodels.init import diagonal_system, legs, legs_low_rank, legs_normal


def test_legs_by_its_definition() -> None:
    a, b = legs(5)
    for n in range(5):
        assert b[n] == pytest.approx((2 * n + 1) ** 0.5, rel=1e-15)
        for k in range(5):
            expected = -(n + 1.0) if n == k else -(((2 * n + 1) * (2 * k + 1)) ** 0.5) if n > k else 0.0
            assert a[n, k] == pytest.approx(expected, rel=1e-15)
    assert sorted(torch.linalg.eigvals(a).real.tolist()) == pytest.approx([-5, -4, -3, -2, -1])


@pytest.mark.parametrize("size", [2, 8, 64])
def test_normal_part(size: int) -> None:
    a, b = legs(size)
    p = legs_low_rank(size)
    normal_part = a + torch.outer(p, p)
    torch.testing.assert_close(b, 2**0.5 * p, rtol=1e-15, atol=0)
    normal = legs_normal(size)
    v = torch.cat((normal.vectors, normal.vectors.conj()), 1)
    eye = torch.eye(size, dtype=v.dtype)
    torch.testing.assert_close(v @ v.mH, eye, rtol=0, atol=1e-13)
    eigenvalues = torch.complex(torch.full((size // 2,), -0.5, dtype=torch.float64), normal.frequencies)
    eigenvalues = torch.cat((eigenvalues, eigenvalues.conj()))
    scale = float(normal.frequencies[-1])
    rebuilt = v @ torch.diag(eigenvalues) @ v.mH
    torch.testing.assert_close(rebuilt, normal_part.to(v.dtype), rtol=0, atol=1e-13 * scale)
    assert (normal.frequencies > 0).all()
    assert (normal.vectors[0].real > 0).all()
    assert normal.vectors[0].imag.abs().max() < 1e-15
    assert float(normal.b.abs().square().sum()) == pytest.approx(size**2 / 2, rel=1e-13)


def test_diagonal_systems() -> None:
    lin, inv, real = (diagonal_system(name, 6) for name in ("lin", "inv", "real"))
    assert lin.a.imag.tolist() == pytest.approx([0, torch.pi, 2 * torch.pi])
    assert inv.a.imag.tolist() == pytest.approx([6 / torch.pi * (6 / k - 1) for k in (1, 3, 5)])
    assert real.a.tolist() == [-1, -2, -3, -4, -5, -6]
    assert (lin.a.real == -0.5).all()
    assert [system.paired for system in (lin, inv, real)] == [True, True, False]
    whole, half = diagonal_system("legs", 64), diagonal_system("legs", 64, b_half=True)
    torch.testing.assert_close(whole.b, 2 * half.b)
    assert whole.b.abs().max() > 40
    clipped = diagonal_system("legs", 64, b_clip=2.0)
    assert clipped.b.imag.abs().max() == 2
    torch.testing.assert_close(clipped.b.real, whole.b.real)


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("legs", 7, {}, "size is 7; expected an even number.*6 or 8"),
        ("lin", 7, {}, "expected an even number"),
        ("real", 0, {}, "size is 0"),
        ("leg", 8, {}, "unknown init 'leg'. Did you mean legs"),
        ("legs", 8, {"b_clip": -1.0}, "b_clip is -1.0"),
    ],
)
def test_refusals(name: str, size: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagonal_system(name, size, **options)


def test_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert diagonal_system("legs", 10).a.device.type == "cpu"
