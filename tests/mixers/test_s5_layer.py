"""S5 as a layer: its equations against a dense system, its inits, and its arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from state_space_reference import run, zero_order_hold

from seqmodels.init import legs, legs_normal, perturbed_legs
from seqmodels.layout import Layout
from seqmodels.mixers import S4D, S5

F64 = torch.float64


def _complex(pairs: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(pairs.detach().contiguous())


def _dense(layer: S5, u: torch.Tensor, start: torch.Tensor, direction: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States by the matrix exponential of each mode, one input channel at a time; C x without D."""
    length, modes = u.shape[0], layer.A_real.shape[0]
    a = torch.complex(-layer.A_real.detach(), layer.A_imag.detach())
    b, c, dt = _complex(layer.B), _complex(layer.C[direction]), layer.log_dt.detach().exp()
    states = torch.zeros(length, modes, dtype=torch.complex128)
    last = torch.zeros(modes, dtype=torch.complex128)
    for n in range(modes):
        for h in range(layer.d_model):
            one = zero_order_hold(a[n].view(1, 1), b[n, h].view(1), float(dt[n]))
            begin = start[n : n + 1] if h == 0 else torch.zeros(1, dtype=torch.complex128)
            seen, final = run(*one, torch.ones(1, dtype=torch.complex128), u[:, h], begin)
            states[:, n] += seen
            last[n] += final[0]
    return layer.scale * (states @ c.T).real, last


@pytest.mark.parametrize("mode", ["scan", "convolution"])
@pytest.mark.parametrize("init", ["legs", "ptd"])
@pytest.mark.parametrize("carried", [False, True])
def test_scan_is_convolution_is_step_is_dense_system(mode: str, init: str, carried: bool) -> None:
    torch.manual_seed(0)
    layer = S5(3, d_state=16, num_blocks=2, init=init, mode=mode, activation="none", dtype=F64)
    u = torch.randn(1, 30, 3, dtype=F64)
    state = layer.init_state(1)
    if carried:
        state.ssm.normal_()
    y, last = _dense(layer, u[0], _complex(state.ssm[0]))
    expected = y + layer.D.detach() * u[0]
    whole = layer(u, state, return_state=True)
    torch.testing.assert_close(whole.y[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.state.ssm[0], torch.view_as_real(last), rtol=0, atol=1e-10)
    stepped = torch.stack([layer.step(u[:, t], state) for t in range(30)], 1)
    torch.testing.assert_close(stepped[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.ssm, whole.state.ssm, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["scan", "convolution"])
def test_bidirectional_reads_every_document_from_its_end(mode: str) -> None:
    torch.manual_seed(0)
    layer = S5(3, d_state=8, bidirectional=True, mode=mode, activation="none", dtype=F64)
    u = torch.randn(1, 12, 3, dtype=F64)
    layout = Layout.packed([[7, 4]], 12)
    zero = torch.zeros(4, dtype=torch.complex128)
    found = layer(u, layout=layout).y[0]
    for begin, end in ((0, 7), (7, 11)):
        part = u[0, begin:end]
        ahead, _ = _dense(layer, part, zero)
        behind, _ = _dense(layer, part.flip(0), zero, direction=1)
        expected = ahead + behind.flip(0) + layer.D.detach() * part
        torch.testing.assert_close(found[begin:end], expected, rtol=0, atol=1e-10)


def test_state_is_the_sum_of_s4d_states() -> None:
    """S4D channels with one A and step, and S5's column h of B as B of channel h: S5 mixes their states."""
    torch.manual_seed(0)
    mimo = S5(3, d_state=8, activation="none", dtype=F64)
    single = S4D(3, d_state=8, n_ssm=3, dtype=F64)
    with torch.no_grad():
        mimo.log_dt.fill_(-3.0)
        single.log_dt.fill_(-3.0)
        single.A_real.copy_(mimo.A_real.log().expand(3, -1))
        single.A_imag.copy_(mimo.A_imag.expand(3, -1))
        single.B.copy_(mimo.B.transpose(0, 1))
        u = torch.randn(2, 9, 3, dtype=F64)
        summed = single(u, return_state=True).state.ssm.sum(1)
        torch.testing.assert_close(mimo(u, return_state=True).state.ssm, summed)


def test_initial_system_in_its_first_basis() -> None:
    """Block-diagonal V takes B and C back to real matrices; eigenvalues repeat by block."""
    torch.manual_seed(0)
    layer = S5(200, d_state=32, num_blocks=2, init="ptd", dtype=F64)
    found = perturbed_legs(16)
    eigenvalues = torch.complex(-layer.A_real.detach(), layer.A_imag.detach())
    torch.testing.assert_close(eigenvalues, found.eigenvalues.repeat(2))
    b0 = torch.cat([found.vectors @ part for part in _complex(layer.B).split(16)])
    assert b0.imag.abs().max() < 1e-12
    assert b0.real.std().item() == pytest.approx(32**-0.5, rel=0.03)
    assert b0.real.abs().max() < 2.3 * 32**-0.5  # truncated
    c0 = torch.cat([part @ found.inverse for part in _complex(layer.C[0]).split(16, dim=1)], 1)
    for part in (c0.real, c0.imag):
        assert part.std().item() == pytest.approx((32 * 200) ** -0.5, rel=0.03)
    wide = S5(200, d_state=32, c_init="truncated_normal", dtype=F64)
    c0 = _complex(wide.C[0]) @ legs_normal(32).vectors.mH
    assert c0.abs().square().mean().item() == pytest.approx(1 / 32, rel=0.05)  # half the basis, both parts
    plain = S5(200, d_state=32, c_init="complex_normal", dtype=F64)
    assert plain.C.square().mean().item() == pytest.approx(0.5, rel=0.03)


def test_legs_columns() -> None:
    layer = S5(3, d_state=16, num_blocks=2, init="ptd", b_init="legs", dtype=F64)
    b0 = perturbed_legs(8).vectors @ _complex(layer.B)[8:]
    torch.testing.assert_close(b0.real, legs(8)[1][:, None].expand(8, 3))


def test_real_parts() -> None:
    assert torch.equal(S5(2, d_state=8).A_real, torch.full((4,), 0.5))
    layer = S5(2, d_state=8, real_part="clip", dtype=F64)
    with torch.no_grad():
        layer.A_real.fill_(-1.0)
        layer.log_dt.fill_(0.0)
    z, _ = layer.recurrence()
    assert (z[:, 0] == -1e-4).all()


@pytest.mark.parametrize("gate", ["full_glu", "half_glu1", "half_glu2", "gelu"])
def test_activations(gate: str) -> None:
    torch.manual_seed(0)
    layer = S5(4, d_state=8, activation=gate)
    y = torch.randn(2, 3, 4)
    g = y * (1 + torch.erf(y / 2**0.5)) / 2
    if gate == "gelu":
        expected = g
    else:
        w, b = layer.activation.proj.weight, layer.activation.proj.bias
        gates = torch.sigmoid(g @ w[-4:].T + b[-4:])
        values = {"full_glu": g @ w[:4].T + b[:4], "half_glu1": g, "half_glu2": y}[gate]
        expected = values * gates
    torch.testing.assert_close(layer.activation(y), expected)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    layer = S5(4, d_state=8)
    x = torch.randn(8, 20, 4)
    target = x.roll(1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x).y, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(d_state=10, num_blocks=3), "not divisible by num_blocks=3"),
        (dict(d_state=9, num_blocks=3), "size is 3; expected an even number"),
        (dict(init="lin"), "unknown init 'lin'"),
        (dict(mode="scn"), "unknown mode 'scn'. Did you mean scan"),
        (dict(activation="half_glu"), "unknown activation 'half_glu'. Did you mean half_glu"),
        (dict(discretization="softmax"), "unknown discretization 'softmax'"),
        (dict(activation="none", dropout=0.1), "belongs to the gated activations"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(dt_min=1.0), "dt_min=1.0 and dt_max=0.1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S5(4, **options)


def test_bidirectional_has_no_step() -> None:
    with pytest.raises(ValueError, match="S5: a bidirectional layer cannot take single steps"):
        S5(4, d_state=8, bidirectional=True).step(torch.zeros(1, 4), None)
