"""S4D as a layer: its equations against dense systems, its rules and arguments. The laws are in tests/test_laws.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from state_space_reference import bilinear, run, zero_order_hold

from seqmodels.layout import Layout
from seqmodels.mixers import S4D, ParameterHint
from seqmodels.mixers.discretization import discretize
from seqmodels.models.hints import parameter_hints
from seqmodels.testing import LawViolation, laws

F64 = torch.float64


def _complex(pairs: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(pairs.detach().contiguous())


def _dense_outputs(layer: S4D, u: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token from the continuous system of each channel."""
    y, last = torch.empty_like(u), torch.empty(u.shape[0], layer.d_model, layer.C.shape[2], dtype=torch.complex128)
    a = torch.complex(-layer.A_real.detach().exp(), layer.A_imag.detach())
    rule = zero_order_hold if layer.discretization == "zoh" else bilinear
    for h in range(layer.d_model):
        own = h % layer.n_ssm
        discrete = rule(torch.diag(a[own]), _complex(layer.B[own]), float(layer.log_dt[h].detach().exp()))
        for row in range(u.shape[0]):
            start = torch.zeros(a.shape[1], dtype=torch.complex128) if state is None else _complex(state[row, h])
            out, last[row, h] = run(*discrete, _complex(layer.C[0, h]), u[row, :, h], start)
            y[row, :, h] = layer.scale * out.real + layer.D[0, h].detach() * u[row, :, h]
    return y, torch.view_as_real(last)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["legs", "inv", "lin", "real", "ptd"])
@pytest.mark.parametrize("carried", [False, True])
def test_convolution_is_step_is_dense_system(init: str, rule: str, carried: bool) -> None:
    torch.manual_seed(0)
    layer = S4D(4, d_state=8, init=init, discretization=rule, n_ssm=2, dtype=F64)
    u = torch.randn(2, 40, 4, dtype=F64)
    state = layer.init_state(2)
    if carried:
        state.ssm.normal_()
    expected, last = _dense_outputs(layer, u, state.ssm)
    whole = layer(u, state, return_state=True)
    torch.testing.assert_close(whole.y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.state.ssm, last, rtol=0, atol=1e-10)
    stepped = torch.stack([layer.step(u[:, t], state) for t in range(40)], 1)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.ssm, last, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"channels": 2}, {"bidirectional": True}], ids=str)
def test_scan_is_convolution(monkeypatch, options: dict, packed: bool, dtype: torch.dtype) -> None:
    """Outputs, last states and gradients, by whichever way the layer would take here and by the other."""
    torch.manual_seed(0)
    layer = S4D(5, d_state=8, dtype=dtype, **options)
    layout = Layout.packed([[70, 1, 9], [64, 3]], 80, capacity=6) if packed else None
    u = torch.randn(2, 80, 5, dtype=dtype)
    state = None
    if not layer.bidirectional:
        state = layer.init_state(6 if packed else 2)
        state.ssm.normal_()
    found = []
    for scans in (True, False):
        monkeypatch.setattr(S4D, "_scans", lambda *_, scans=scans: scans)
        leaf = u.clone().requires_grad_()
        out = layer(leaf, state, layout=layout, return_state=state is not None)
        loss = out.y.square().sum() + (0 if out.state is None else out.state.ssm.square().sum())
        found.append([out.y, loss, *torch.autograd.grad(loss, [leaf, *layer.parameters()])])
    # Gradients to steps and A are sums over tokens and modes that cancel: relative to the largest entry.
    for scan, convolution in zip(*found, strict=True):
        error = (scan - convolution).abs().max() / convolution.abs().max()
        assert error < (1e-10 if dtype == F64 else 80 * torch.finfo(dtype).eps)


def test_bidirectional_kernel() -> None:
    """y[l] = sum_j k0[j] u[l - j] + sum_j k1[j] u[l + 1 + j] + D u[l]."""
    torch.manual_seed(0)
    layer = S4D(3, d_state=4, bidirectional=True, dtype=F64)
    u, length = torch.randn(1, 11, 3, dtype=F64), 11
    k0, k1 = layer.kernel(length, F64).detach()
    expected = torch.zeros_like(u)
    for t in range(length):
        for j in range(length):
            if t - j >= 0:
                expected[:, t] += k0[:, j] * u[:, t - j]
            if t + 1 + j < length:
                expected[:, t] += k1[:, j] * u[:, t + 1 + j]
    torch.testing.assert_close(layer(u).y, expected, rtol=0, atol=1e-12)
    without_skip = S4D.kernel(layer, 1, F64)[0, :, 0] - layer.D[0]
    _, b, c = layer.recurrence()
    direct = 2 * (_complex(c[0]) * _complex(b)).real.sum(-1)
    torch.testing.assert_close(without_skip.detach(), direct)


def test_softmax_rule() -> None:
    """DSS: the spec's kernel, for modes that decay and for one that grows."""
    length, dt = 12, 0.2
    a = torch.tensor([-0.5 + 2j, -1 + 0j, 0.7 - 3j], dtype=torch.complex128)
    c = torch.tensor([1 + 1j, 0.5 - 2j, -1 + 0.3j], dtype=torch.complex128)
    z, factor = discretize(torch.view_as_real(a), torch.tensor(dt, dtype=F64), "softmax", softmax_length=length)
    times = torch.arange(length)
    found = ((c * _complex(factor))[:, None] * torch.exp(_complex(z)[:, None] * times)).sum(0).real

    def r(x):
        return x.conj() / (x.abs() ** 2 + 1e-7)

    decays = (a.real <= 0)[:, None]
    z, w = dt * a, c[:, None]
    left = w * ((z.exp() - 1) * r(a * ((length * z).exp() - 1)))[:, None] * torch.exp(z[:, None] * times)
    grown = w * (((-z).exp() - 1) * r(a * ((-length * z).exp() - 1)))[:, None]
    grown = grown * torch.exp(z[:, None] * (times - length + 1))
    torch.testing.assert_close(found, torch.where(decays, left, grown).sum(0).real, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("real_part", ["exp", "relu", "softplus", "free", "clip"])
@pytest.mark.parametrize("dt_activation", ["exp", "softplus"])
def test_parameterisations_start_from_the_same_system(real_part: str, dt_activation: str) -> None:
    torch.manual_seed(3)
    plain = S4D(4, d_state=8, init="real", dtype=F64).recurrence()
    torch.manual_seed(3)
    other = S4D(4, d_state=8, init="real", real_part=real_part, dt_activation=dt_activation, dtype=F64).recurrence()
    torch.testing.assert_close(other.z, plain.z)
    torch.testing.assert_close(other.b, plain.b)


def test_initial_values() -> None:
    layer = S4D(512, d_state=16, dt_min=1e-3, dt_max=1.0, channels=2)
    dt = layer.log_dt.exp()
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 1.001
    assert layer.log_dt.mean().item() == pytest.approx((math.log(1e-3) + 0) / 2, abs=0.4)
    assert layer.C.square().sum(-1).mean().item() == pytest.approx(1, rel=0.05)
    assert torch.equal(layer.A_real.exp(), torch.full((1, 8), 0.5))
    assert layer.B[..., 1].abs().max() <= 2


def test_rate_is_a_longer_step() -> None:
    torch.manual_seed(0)
    layer = S4D(4, d_state=8, dtype=F64)
    layer.rate = 2.0
    fast = layer.kernel(9, F64)
    layer.rate = 1.0
    with torch.no_grad():
        layer.log_dt += math.log(2)
    torch.testing.assert_close(layer.kernel(9, F64), fast)
    with pytest.raises(ValueError, match="rate is 0"):
        layer.rate = 0


def test_long_phase_in_float32() -> None:
    """1.3e6 radians at length 16384: the float32 layer against the same numbers in float64."""
    torch.manual_seed(0)
    layer = S4D(2, d_state=64, dt_min=0.05, dt_max=0.1)
    with torch.no_grad():
        layer.A_real.fill_(math.log(1e-4))  # so that decay hides nothing
    exact = S4D(2, d_state=64, dtype=F64)
    exact.load_state_dict(layer.state_dict())
    assert (layer.A_imag.abs().max() * layer.log_dt.exp().max()).item() * 16384 > 1e6
    found, expected = layer.kernel(16384), exact.kernel(16384, F64)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6


def test_hints_by_name() -> None:
    layer = S4D(4, d_state=8, learning_rates={"log_dt": None, "B": 0.0}, weight_decays={"C": 0.0})
    assert parameter_hints(layer) == {
        "log_dt": ParameterHint(0.0, None),
        "A_real": ParameterHint(0.0, 1e-3),
        "A_imag": ParameterHint(0.0, 1e-3),
        "B": ParameterHint(0.0, 0.0),
        "C": ParameterHint(0.0, None),
    }
    with pytest.raises(ValueError, match=r"learning_rates names 'log_dts'. Did you mean log_dt"):
        S4D(4, learning_rates={"log_dts": 1.0})
    with pytest.raises(ValueError, match=r"weight_decays\['C'\] is -1"):
        S4D(4, weight_decays={"C": -1.0})


def test_bidirectional_layers_have_no_state() -> None:
    layer = S4D(4, d_state=8, bidirectional=True)
    x = torch.randn(1, 5, 4)
    for call in (
        lambda: layer.init_state(1),
        lambda: layer.step(x[:, 0], None),
        lambda: layer(x, return_state=True),
    ):
        with pytest.raises(ValueError, match=r"S4D: a bidirectional layer cannot .* bidirectional=False"):
            call()
    assert layer.state_bytes(100) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(d_state=7), "size is 7; expected an even number"),
        (dict(init="ling"), "unknown init 'ling'. Did you mean lin"),
        (dict(discretization="zho"), "unknown discretization 'zho'. Did you mean zoh"),
        (dict(discretization="softmax"), "softmax needs the length"),
        (dict(softmax_length=5), "the other rules take none"),
        (dict(dt_min=0.1, dt_max=0.1), "dt_min=0.1 and dt_max=0.1; expected 0 < dt_min < dt_max"),
        (dict(dt_min=0.0), "dt_min=0.0"),
        (dict(real_part="expo"), "unknown real_part 'expo'. Did you mean exp"),
        (dict(n_ssm=3), "not divisible by n_ssm=3"),
        (dict(channels=0), "channels is 0"),
        (dict(rate=-1.0), "rate is -1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4D(4, **options)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    layer = S4D(4, d_state=8, channels=2)
    F.mse_loss(layer(torch.randn(2, 9, 4)).y, torch.zeros(2, 9, 4)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


def test_packed_documents_wider_than_a_chunk() -> None:
    torch.manual_seed(0)
    layer = S4D(2, d_state=4, dtype=F64)
    layout = Layout.packed([[150, 3], [140]], 160)
    x = torch.randn(2, 160, 2, dtype=F64)
    state = layer.init_state(3)
    state.ssm.normal_()
    packed = layer(x, state, layout=layout, return_state=True)
    alone = layer(x[:1, 150:153], state.select(torch.tensor([1])), return_state=True)
    torch.testing.assert_close(packed.y[:1, 150:153], alone.y, rtol=0, atol=1e-12)
    torch.testing.assert_close(packed.state.ssm[1:2], alone.state.ssm, rtol=0, atol=1e-12)


def test_causality_law_catches_a_leak_above_rounding() -> None:
    """Layers that convolve by FFT are held to rounding, not let off."""

    class Leaky(S4D):
        def forward(self, x, state=None, *, layout=None, return_state=False):
            output = super().forward(x, state, layout=layout, return_state=return_state)
            later = F.pad(x[:, 1:], (0, 0, 0, 1))
            return output._replace(y=output.y + 1e-8 * (later - later.detach()))  # in the gradient alone

    laws.causality(S4D(4, d_state=8))
    with pytest.raises(LawViolation, match="from outputs before token"):
        laws.causality(Leaky(4, d_state=8))
