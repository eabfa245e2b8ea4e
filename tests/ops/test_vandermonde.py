"""The Vandermonde products: reference values, each backend against the definition, memory, states of documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from two_times_rule import check_against
from vandermonde_cases import SIZES, exponents, inputs, run

import seqmodels
from seqmodels import Layout
from seqmodels.backends import BackendUnavailable
from seqmodels.ops import extension
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.vandermonde import diagonal_final_state, diagonal_response, powers, vandermonde, vandermonde_adjoint

needs_extension = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))
LEVELS = ("default", "avx2", "avx512")
BACKENDS = ["reference", "torch", pytest.param("cpu", marks=needs_extension)]


def at_level(level: str):
    try:
        with extension.capability(level):
            pass
    except RuntimeError as error:
        pytest.skip(str(error))
    return extension.capability(level)


# ---- published values: N = 64, B = C = 1, step 0.01, length 1024 (float64)

STEP, LENGTH = 0.01, 1024
LIN = -0.5 + 1j * math.pi * np.arange(32)
INV = -0.5 + 1j * (64 / math.pi) * (64 / (2 * np.arange(32) + 1) - 1)
REAL = -(np.arange(64) + 1.0) + 0j
VALUES = {
    "lin, zero-order hold": (LIN, "zoh", 2.0, (0.6052491230, 0.4261746406, -0.0359083922, 0.0009389233), 4.1409190397),
    "lin, bilinear": (LIN, "bilinear", 2.0, (0.5937483242, 0.4343225920, -0.0064655550, 0.0000931507), 4.1386215475),
    "inv, zero-order hold": (INV, "zoh", 2.0, (0.5570045045, 0.4426529856, 0.1449607931, -0.0044021954), 4.3723553197),
    "real, zero-order hold": (REAL, "zoh", 1.0, (0.5492745863, 0.4101696978), 4.7438551902),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_published_kernels(name, backend):
    a, method, scale, entries, total = VALUES[name]
    if method == "zoh":
        z, weight = STEP * a, np.expm1(STEP * a) / a
    else:
        z, weight = np.log((1 + STEP * a / 2) / (1 - STEP * a / 2)), STEP / (1 - STEP * a / 2)
    pairs = [torch.view_as_real(torch.from_numpy(value))[None] for value in (z, weight)]
    if backend == "cpu":
        pairs[1] = pairs[1].float()
    with seqmodels.backend(backend):
        kernel = vandermonde(*pairs, LENGTH, scale=scale)[0]
    tolerance = 1e-6 if backend == "cpu" else 6e-11
    for index, value in zip((0, 1, 10, 100), entries, strict=False):
        assert abs(kernel[index].item() - value) < tolerance
    assert abs(kernel.double().sum().item() - total) < 20 * tolerance


# ---- backends


def test_definition_against_numpy():
    z, weight, times = exponents(2, 3, torch.float64), torch.randn(4, 2, 3, 2, dtype=torch.float64), np.arange(11)
    power = np.exp(torch.view_as_complex(z).numpy()[..., None] * times)
    numbers = torch.view_as_complex(weight).numpy()
    x = torch.randn(4, 2, 11, dtype=torch.float64)
    with seqmodels.backend("reference"):
        kernel, state = vandermonde(z, weight, 11, scale=2.0), vandermonde_adjoint(z, x)
    np.testing.assert_allclose(kernel, 2 * np.einsum("rhn,hnl->rhl", numbers, power).real, rtol=1e-11, atol=1e-12)
    expected = np.einsum("rhl,hnl->rhn", x.numpy(), power)
    np.testing.assert_allclose(torch.view_as_complex(state), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_torch_form_in_float64(size):
    values = inputs(size, torch.float64)
    truth = run(values, "reference")
    for key, value in run(values, "torch").items():
        torch.testing.assert_close(value, truth[key], rtol=1e-10, atol=1e-10 * max(1.0, truth[key].abs().max().item()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("backend", "level"), [("torch", "default"), *(("cpu", level) for level in LEVELS)])
def test_kernels_in_float32(backend, level, size):
    if backend == "cpu" and extension.load() is not None:
        pytest.skip(str(extension.load()))
    values = inputs(size, torch.float32)
    with at_level(level) if backend == "cpu" else seqmodels.backend(backend):
        found = run(values, backend)
    check_against(found, run(values, "reference"), run(values, "reference", torch.float64), str(size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_phase_of_two_million_radians(backend):
    """Barely damped modes at the largest frequency of N = 64 with step 0.1: the last entry's phase is exact."""
    length = 16384
    z = torch.tensor([[[-1e-6, 130.32738], [-1e-6, 91.7]]])
    weight = torch.tensor([[[0.5, -0.25], [0.5, 0.1]]])
    with seqmodels.backend(backend):
        kernel = vandermonde(z, weight, length, scale=2.0)[0].double().numpy()
    exact = np.exp(torch.view_as_complex(z.double()).numpy()[0][:, None] * np.arange(length))
    exact = 2 * (torch.view_as_complex(weight.double()).numpy()[0] @ exact).real
    assert 130.32738 * length > 2e6
    assert np.abs(kernel - exact).max() < 1e-6  # four roundings of a sum of size 2


def test_the_bound_catches_an_unreduced_phase():
    values = inputs((1, 2, 4, 300), torch.float32)
    low, truth = run(values, "reference"), run(values, "reference", torch.float64)
    times = torch.arange(300.0)
    phase = values["z"][..., 1, None] * times
    size = torch.exp(values["z"][..., 0, None] * times)
    weight = values["weight"][0, ..., None]
    naive = 2 * (weight[..., 0, :] * size * phase.cos() - weight[..., 1, :] * size * phase.sin()).sum(1)
    low["kernel"], found = low["kernel"], {**low, "kernel": naive[None]}
    with pytest.raises(AssertionError, match="from the float64 definition"):
        check_against(found, low, truth, "float32 phase")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    z = exponents(2, 3, torch.float64, rate=1.0).requires_grad_()
    weight = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    with seqmodels.backend(backend):
        assert torch.autograd.gradcheck(lambda z, w: vandermonde(z, w, 5, scale=2.0), (z, weight))
        assert torch.autograd.gradcheck(vandermonde_adjoint, (z, x))


@pytest.mark.parametrize("layout", [None, Layout.packed([[3, 1], [2, 4]], 7, capacity=5)])
def test_gradcheck_of_states(layout):
    documents = 2 if layout is None else 5
    z = exponents(2, 3, torch.float64, rate=1.0).requires_grad_()
    state = torch.randn(documents, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)

    def final(z, x, b, state):
        return diagonal_final_state(z, x, input_weight=b, initial_state=state, layout=layout)

    assert torch.autograd.gradcheck(final, (z, x, b, state))
    assert torch.autograd.gradcheck(lambda z, w: diagonal_response(z, w, 7, scale=2.0, layout=layout), (z, state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    values = {key: value.requires_grad_() for key, value in inputs((2, 3, 4, 9), torch.float32).items()}
    torch.library.opcheck(torch.ops.seqmodels.vandermonde.default, (values["z"], values["weight"], 9, 2.0, backend))
    torch.library.opcheck(torch.ops.seqmodels.vandermonde_adjoint.default, (values["z"], values["x"], backend))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_no_tensor_of_heads_states_length(backend):
    """The largest tensor made, forward and backward, is a twentieth of heads x states x length complex numbers."""
    heads, states, length = 64, 64, 2048
    z, weight = exponents(heads, states, torch.float32), torch.randn(heads, states, 2)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for value in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return made

    with seqmodels.backend(backend):
        z, weight = z.requires_grad_(), weight.requires_grad_()
        operator = seqmodels.ops.registration.OPERATORS["vandermonde"]
        with Watch(), torch.no_grad():
            operator._forward(z, weight[None], length, 2.0, backend)
            operator._backward(torch.randn(1, heads, length), z, weight[None], length, 2.0, backend)
    assert 0 < largest < heads * states * length * 8 / 20


@needs_extension
def test_results_do_not_depend_on_the_number_of_threads():
    values = inputs((2, 9, 20, 300), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(values, "cpu")
        torch.set_num_threads(3)
        three = run(values, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[key], three[key]) for key in one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_decay_underflows_to_zero(backend):
    z = torch.tensor([[[-60.0, 3.0], [-1000.0, 1.0]]])
    with seqmodels.backend(backend):
        kernel = vandermonde(z, torch.ones(1, 2, 2), 500)
        state = vandermonde_adjoint(z, torch.ones(1, 1, 500))
    assert kernel[0, 0] == 2
    assert not kernel[0, 2:].any()
    assert state.isfinite().all()


# ---- states of documents


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "layout",
    [None, Layout.packed([[150, 1, 140], [2]], 300, capacity=6), Layout.left_padded([3, 300])],
    ids=["rows", "packed", "left padded"],
)
def test_states_are_those_of_the_recurrence(backend, layout):
    heads, states, length = 3, 4, 300
    documents = 2 if layout is None else layout.num_documents
    dtype = torch.float32 if backend == "cpu" else torch.float64
    z = exponents(heads, states, torch.float64)
    b, c = (torch.randn(heads, states, 2, dtype=dtype) for _ in range(2))
    start = torch.randn(documents, heads, states, 2, dtype=dtype)
    x = torch.randn(2, length, heads, dtype=dtype)
    if layout is not None:
        x[~layout.valid] = float("nan")
    with seqmodels.backend(backend):
        final = diagonal_final_state(z, x, input_weight=b, initial_state=start, layout=layout)
        numbers = torch.view_as_complex(c) * torch.exp(torch.view_as_complex(z)) * torch.view_as_complex(start)
        weight = torch.view_as_real(numbers).to(dtype)
        response = diagonal_response(z, weight, length, scale=2.0, layout=layout)
    decay = torch.view_as_real(torch.exp(torch.view_as_complex(z))).flatten(0, 1)
    with seqmodels.backend("reference"):
        drive = (b.double() * x.double()[..., None, None]).flatten(2, 3)
        _, expected = linear_recurrence(decay, drive, initial_state=start.double().flatten(1, 2), layout=layout)
        alone, _ = linear_recurrence(
            decay, torch.zeros(2, length, heads * states, 2, dtype=torch.float64),
            initial_state=start.double().flatten(1, 2), layout=layout,
        )  # fmt: skip
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if backend == "cpu" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(final.flatten(1, 2).double(), expected, **tolerance)
    numbers = torch.view_as_complex(alone).view(2, length, heads, states) * torch.view_as_complex(c.double())
    torch.testing.assert_close(response.double(), 2 * numbers.sum(-1).real, **tolerance)


def test_states_compile_without_a_break():
    layout = Layout.packed([[2, 3], [4]], 6)

    def function(z, x, layout):
        state = diagonal_final_state(z, x, layout=layout)
        return diagonal_response(z, state, layout=layout)

    z, x = exponents(2, 3, torch.float32), torch.randn(2, 6, 2)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, x, layout), function(z, x, layout))


def test_powers():
    z = exponents(2, 3, torch.float64)
    times = torch.tensor([[0, 1], [7, 16384]])
    expected = np.exp(times.numpy()[..., None, None] * torch.view_as_complex(z).numpy())
    np.testing.assert_allclose(torch.view_as_complex(powers(z, times)), expected, rtol=1e-9)


def test_bad_input():
    z, weight = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match=r"z has shape \(2, 3\)"):
        vandermonde(z[..., 0], weight, 4)
    with pytest.raises(ValueError, match="weight has shape"):
        vandermonde(z, weight[:1], 4)
    with pytest.raises(ValueError, match="length is 0"):
        vandermonde(z, weight, 0)
    with pytest.raises(TypeError, match=r"complex64.*view_as_real"):
        vandermonde(z, weight.to(torch.complex64), 4)
    with pytest.raises(ValueError, match="x has shape"):
        vandermonde_adjoint(z, torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="length is None"):
        diagonal_response(z, weight[None])
    with pytest.raises(ValueError, match="weight has 1 rows; expected 2"):
        diagonal_response(z, weight[None], layout=Layout.full(2, 5))
    with pytest.raises(ValueError, match="initial_state has shape"):
        diagonal_final_state(z, torch.zeros(2, 5, 2), initial_state=torch.zeros(1, 2, 3, 2))
    with pytest.raises(ValueError, match="layout is for a grid"):
        diagonal_final_state(z, torch.zeros(2, 5, 2), layout=Layout.full(2, 4))


@needs_extension
def test_cpu_kernels_refuse_float64_by_name():
    with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="take float32"):
        vandermonde(torch.zeros(1, 2, 2).double(), torch.zeros(1, 2, 2).double(), 4)
