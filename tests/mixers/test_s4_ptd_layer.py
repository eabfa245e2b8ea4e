"""S4-PTD and S4-DPLR: kernels against dense systems, and what a resonance does to each layer."""

from __future__ import annotations

import math

import pytest
import torch
from state_space_reference import bilinear, kernel, zero_order_hold

from seqmodels.init import legs, legs_low_rank, legs_normal, perturbed_legs
from seqmodels.mixers import S4D, S4DPLR, S4PTD

F64 = torch.float64


@pytest.mark.parametrize("train_b", [False, True])
def test_ptd_kernel_is_the_dense_kernel(train_b: bool) -> None:
    """C_0 real gives the zero-order-hold kernel of (A + E, B, C_0)."""
    layer = S4PTD(2, d_state=16, train_b=train_b, dtype=F64)
    found = perturbed_legs(16)
    a, b = legs(16)
    c0 = torch.randn(2, 16, dtype=F64)
    with torch.no_grad():
        c = c0.to(torch.complex128) @ found.vectors
        layer.C[0].copy_(torch.view_as_real(c if train_b else c * found.input_vector()))
    kernels = layer.kernel(50, F64).detach()[0]
    kernels[:, 0] -= layer.D[0].detach()
    for h in range(2):
        dt = float(layer.log_dt[h].detach().exp())
        discrete = zero_order_hold((a + found.perturbation).to(torch.complex128), b, dt)
        expected = kernel(*discrete, c0[h].to(torch.complex128), 50)
        assert expected.imag.abs().max() < 1e-12
        torch.testing.assert_close(kernels[h], expected.real, rtol=0, atol=1e-11)


def test_ptd_layer_keeps_every_mode_and_real_outputs() -> None:
    torch.manual_seed(0)
    layer = S4PTD(64, d_state=32, dtype=F64)
    assert layer.A_imag.shape == (1, 32)
    assert layer.scale == 1.0
    assert layer.B is None
    assert "B" not in layer.parameter_hints
    # C_0 is real normal: C / (V^-1 B) V^-1 gives it back.
    found = perturbed_legs(32)
    c0 = torch.view_as_complex(layer.C.detach()[0].contiguous()) / found.input_vector() @ found.inverse
    assert c0.imag.abs().max() < 1e-9
    assert c0.real.std() == pytest.approx(1, rel=0.1)
    wild = S4PTD(2, d_state=32, perturbation="random", perturbation_size=0.03)
    assert (-wild.A_real.exp()).max() < 0


def test_unknown_perturbation() -> None:
    with pytest.raises(ValueError, match=r"unknown perturbation 'randon'. Did you mean random"):
        S4PTD(2, perturbation="randon")  # type: ignore[arg-type]


def _dplr(c: torch.Tensor, dt: float, size: int = 8) -> S4DPLR:
    """One channel with C given in LegS's own basis."""
    layer = S4DPLR(1, d_state=size, dtype=F64)
    with torch.no_grad():
        layer.log_dt.fill_(math.log(dt))
        layer.D.zero_()
        layer.C[0, 0].copy_(torch.view_as_real(c.to(torch.complex128) @ legs_normal(size).vectors))
    return layer


def test_dplr_reference_values() -> None:
    found = _dplr(torch.ones(8, dtype=F64), 0.1).kernel(200, F64)[0, 0].detach()
    expected = [0.8000432849, -0.2717787392, 0.1025482959, 0.1608889610]
    assert found[:4].tolist() == pytest.approx(expected, abs=1e-10)
    a, b = legs(8)
    ones = torch.ones(8, dtype=torch.complex128)
    dense = kernel(*bilinear(a, b, 0.1), ones, 200).real
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)
    held = kernel(*zero_order_hold(a.to(torch.complex128), b, 0.1), ones, 4).real
    assert held.tolist() == pytest.approx([0.5844459275, -0.0215097161, 0.1223448201, 0.1083650786], abs=1e-10)


@pytest.mark.parametrize("length", [64, 97])
def test_dplr_is_the_cauchy_kernel(length: int) -> None:
    """The generating function at the roots of unity, by sums over modes and the Woodbury identity."""
    torch.manual_seed(0)
    size, dt = 16, 0.05
    c = torch.randn(size, dtype=F64)
    normal = legs_normal(size)
    v = torch.cat((normal.vectors, normal.vectors.conj()), 1)
    lam = torch.complex(torch.full((size // 2,), -0.5, dtype=F64), normal.frequencies)
    lam = torch.cat((lam, lam.conj()))
    a, b = legs(size)
    discrete, _ = bilinear(a, b, dt)
    truncated = (c.to(v.dtype) - c.to(v.dtype) @ torch.linalg.matrix_power(discrete, length)) @ v
    bv, p = v.mH @ b.to(v.dtype), v.mH @ legs_low_rank(size).to(v.dtype)
    w = torch.exp(-2j * math.pi * torch.arange(length // 2 + 1, dtype=F64) / length)

    def q(x, y):  # times 1 / (1 + w), regular at w = -1
        below = 2 * (1 - w)[:, None] - (1 + w)[:, None] * dt * lam
        return (dt * x * y / below).sum(-1)

    correction = q(truncated, p) * q(p.conj(), bv) / (1 + (1 + w) * q(p.conj(), p))
    expected = torch.fft.irfft(2 * (q(truncated, bv) - (1 + w) * correction), n=length)
    found = _dplr(c, dt, size).kernel(length, F64)[0, 0].detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_step_refuses_very_long_sequences() -> None:
    with pytest.raises(ValueError, match="fewer than 262144"):
        S4DPLR(1, d_state=2).kernel(2**18)


def test_a_resonance_goes_through_s4d_alone() -> None:
    """0.1 cos(w t) at S4D's last frequency, N = 32, dt = 1e-3: the layers' outputs once they have settled."""
    torch.manual_seed(0)
    length, dt, size = 8192, 1e-3, 32
    wave = 0.1 * torch.cos(325.4 * dt * torch.arange(length, dtype=F64))
    c0 = torch.randn(4, size, dtype=F64).to(torch.complex128)
    normal, found = legs_normal(size), perturbed_legs(size)
    layers = {
        "s4d": (S4D(4, d_state=size, b_half=True, b_clip=None, dtype=F64), c0 @ normal.vectors),
        "s4_ptd": (S4PTD(4, d_state=size, dtype=F64), c0 @ found.vectors * found.input_vector()),
        "s4_dplr": (S4DPLR(4, d_state=size, dtype=F64), c0 @ normal.vectors),
    }
    loudest = {}
    for name, (layer, c) in layers.items():
        with torch.no_grad():
            layer.log_dt.fill_(math.log(dt))
            layer.D.zero_()
            layer.C[0].copy_(torch.view_as_real(c))
            y = layer(wave[None, :, None].expand(1, -1, 4).contiguous()).y
        loudest[name] = float(y[0, -1000:].square().mean().sqrt())
    assert loudest["s4d"] > 50 * loudest["s4_dplr"]
    assert loudest["s4_ptd"] < 2 * loudest["s4_dplr"]
