"""The linear recurrence: each backend against the definition, and the op's contract."""

from __future__ import annotations

import pytest
import torch
from linear_recurrence_cases import cases, run
from two_times_rule import check_against

import seqmodels
from seqmodels import Layout
from seqmodels.backends import BackendUnavailable
from seqmodels.ops import extension
from seqmodels.ops.linear_recurrence import linear_recurrence, linear_recurrence_step

needs_extension = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))
LEVELS = ("default", "avx2", "avx512")


def at_level(level: str):
    try:
        with extension.capability(level):
            pass
    except RuntimeError as error:
        pytest.skip(str(error))
    return extension.capability(level)


@pytest.mark.parametrize("pairs", [False, True])
def test_definition_is_the_sum_over_the_past(pairs):
    """h[t] = sum_s (product of decays after s) x[s] + (product of all) h[-1], as a dense matrix."""
    length, channels = 9, 3
    kind = torch.complex128 if pairs else torch.float64
    decay, x = torch.randn(length, channels, dtype=kind), torch.randn(length, channels, dtype=kind)
    start = torch.randn(channels, dtype=kind)
    expected = torch.zeros(length, channels, dtype=kind)
    for t in range(length):
        for s in range(t + 1):
            expected[t] += decay[s + 1 : t + 1].prod(0) * x[s]
        expected[t] += decay[: t + 1].prod(0) * start
    real = torch.view_as_real if pairs else (lambda value: value)
    with seqmodels.backend("reference"):
        h, final = linear_recurrence(real(decay)[None], real(x)[None], initial_state=real(start)[None])
    torch.testing.assert_close(h[0], real(expected), rtol=1e-13, atol=1e-13)
    assert torch.equal(final, h[:, -1])


def test_torch_form_in_float64():
    for case in cases(5, torch.float64):
        truth = run(case, "reference")
        for key, value in run(case, "torch").items():
            torch.testing.assert_close(
                value, truth[key], rtol=1e-12, atol=1e-12, msg=lambda m, k=key, c=case: f"{c.name} {k}: {m}"
            )


def test_torch_form_in_float32():
    for case in cases(5, torch.float32):
        check_against(run(case, "torch"), run(case, "reference"), run(case, "reference", torch.float64), case.name)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_kernels(level):
    with at_level(level):  # 21 channels: whole vectors and a rest at every level
        for case in cases(21, torch.float32):
            check_against(run(case, "cpu"), run(case, "reference"), run(case, "reference", torch.float64), case.name)


@needs_extension
def test_cpu_kernels_over_several_blocks_of_channels():
    for case in cases(2300, torch.float32, ("two tokens", "left padded")):
        check_against(run(case, "cpu"), run(case, "reference"), run(case, "reference", torch.float64), case.name)


def test_the_bound_catches_a_wrong_decay():
    case = next(iter(cases(5, torch.float32, ("prime",))))
    truth, low = run(case, "reference", torch.float64), run(case, "reference")
    case.tensors[0][2] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="from the float64 definition"):
        check_against(run(case, "torch"), low, truth, case.name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tail", [(3,), (2, 2)])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("layout", [None, Layout.packed([[2, 1], [3]], 4, capacity=4)])
def test_gradcheck(backend, tail, varying, layout):
    documents = 2 if layout is None else 4
    decay = torch.randn(*((2, 4) if varying else ()), *tail, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, *tail, dtype=torch.float64, requires_grad=True)
    state = torch.randn(documents, *tail, dtype=torch.float64, requires_grad=True)
    with seqmodels.backend(backend):
        assert torch.autograd.gradcheck(
            lambda a, b, s: linear_recurrence(a, b, initial_state=s, layout=layout), (decay, x, state)
        )


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=needs_extension)])
def test_opcheck(backend):
    layout = Layout.packed([[2, 3], [4]], 6)
    for tail, varying, packed in (((3,), False, True), ((3, 2), True, True), ((3, 2), False, False)):
        decay = torch.randn(*((2, 6) if varying else ()), *tail, requires_grad=True)
        x, state = (
            torch.randn(2, 6, *tail, requires_grad=True),
            torch.randn(3 if packed else 2, *tail, requires_grad=True),
        )
        documents = (layout.starts, layout.lengths) if packed else (None, None)
        for start in (state, None):
            args = (decay, x, start, *documents, backend)
            torch.library.opcheck(torch.ops.seqmodels.linear_recurrence.default, args)
    if backend != "cpu":
        args = (torch.randn(3, 2), torch.randn(4, 3, 2), torch.randn(4, 3, 2), backend)
        torch.library.opcheck(torch.ops.seqmodels.linear_recurrence_step.default, args)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("tail", [(7,), (7, 2)])
def test_split_and_steps_give_the_whole(backend, tail):
    decay, x, start = 0.6 * torch.randn(tail), torch.randn(2, 11, *tail), torch.randn(2, *tail)
    close = {"rtol": 1e-5, "atol": 1e-6}
    with seqmodels.backend(backend):
        whole, final = linear_recurrence(decay, x, initial_state=start)
        for cut in (1, 4, 10):
            first, between = linear_recurrence(decay, x[:, :cut], initial_state=start)
            second, end = linear_recurrence(decay, x[:, cut:], initial_state=between)
            torch.testing.assert_close(torch.cat([first, second], 1), whole, **close)
            torch.testing.assert_close(end, final, **close)
    for step_backend in ("reference", "torch"):
        state = start.clone()
        with seqmodels.backend(step_backend):
            steps = [linear_recurrence_step(decay, x[:, t], state).clone() for t in range(11)]
        torch.testing.assert_close(torch.stack(steps, 1), whole, **close)


@needs_extension
def test_results_do_not_depend_on_the_number_of_threads():
    case = list(cases(3000, torch.float32, ("packed",)))[4]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, "cpu")
        torch.set_num_threads(3)
        three = run(case, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[key], three[key]) for key in one)


def test_low_precision_and_autocast_compute_in_float32():
    decay, x = torch.rand(4), torch.randn(1, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        h, final = linear_recurrence(decay, x)
    expected, _ = linear_recurrence(decay, x.float())
    assert (h.dtype, final.dtype) == (torch.float32, torch.float32)
    assert torch.equal(h, expected)


def test_compiles_without_a_break():
    layout = Layout.packed([[2, 3], [4]], 6)

    def function(decay, x, layout):
        return linear_recurrence(decay, x, layout=layout)

    decay, x = torch.rand(3, 2), torch.randn(2, 6, 3, 2)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(decay, x, layout), function(decay, x, layout), strict=True):
        assert torch.equal(got, wanted)


def test_bad_input():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match="at least one token"):
        linear_recurrence(torch.zeros(3), x[:, :0])
    with pytest.raises(ValueError, match=r"decay has shape \(4,\); expected \(3,\)"):
        linear_recurrence(torch.zeros(4), x)
    with pytest.raises(ValueError, match="initial_state has shape"):
        linear_recurrence(torch.zeros(3), x, initial_state=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="layout is for a grid"):
        linear_recurrence(torch.zeros(3), x, layout=Layout.full(2, 4))
    with pytest.raises(TypeError, match=r"complex64.*view_as_real"):
        linear_recurrence(torch.zeros(3, dtype=torch.complex64), x)
    with pytest.raises(TypeError, match="float64 throughout"):
        linear_recurrence(torch.zeros(3), x.double())
    with pytest.raises(ValueError, match="state is"):
        linear_recurrence_step(torch.zeros(3), x[:, 0], torch.zeros(2, 4))


@needs_extension
def test_cpu_kernels_take_float32_and_refuse_wild_documents():
    x = torch.zeros(1, 5, 3)
    with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="take float32"):
        linear_recurrence(torch.zeros(3).double(), x.double())
    for start, size in ((3, 3), (-1, 2), (5, 1), (0, 6), (0, -1)):
        with pytest.raises(RuntimeError, match="leaves its row"):
            torch.ops.seqmodels_cpu.linear_recurrence(
                torch.zeros(3), x, None, torch.tensor([start]), torch.tensor([size])
            )
