"""The diagonal SSM as a scan: each backend against the definition, the definition against a dense matrix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diagonal_ssm_cases import KINDS, problem, problems, rounded, run
from two_times_rule import check_against

import seqmodels
from seqmodels import Layout, backends
from seqmodels.backends import BackendUnavailable
from seqmodels.ops import extension
from seqmodels.ops.diagonal_ssm import diagonal_ssm, diagonal_ssm_step, pays_off
from seqmodels.ops.long_conv import long_conv
from seqmodels.ops.vandermonde import vandermonde

needs_extension = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))
LEVELS = ("default", "avx2", "avx512")


def at_level(level: str):
    try:
        with extension.capability(level):
            pass
    except RuntimeError as error:
        pytest.skip(str(error))
    return extension.capability(level)


@pytest.mark.parametrize("reverse", [False, True])
def test_definition_against_a_dense_matrix(reverse):
    """K[l] = sum_n Re(c b e^{lz}) as a Toeplitz matrix, plus what the initial state adds."""
    leaves, _, _ = problem("below a chunk", 2, 3, None, "reverse" if reverse else "initial state")
    z, b, c = (torch.view_as_complex(leaves[name]) for name in "zbc")
    u, length = leaves["u"], leaves["u"].shape[1]
    times = torch.arange(length)
    taps = torch.einsum("hn,hnl->hl", c * b, torch.exp(z[..., None] * times)).real
    lag = times[:, None] - times if not reverse else times - times[:, None] - 1
    matrix = torch.where(lag >= 0, taps[:, lag.clamp_min(0)], 0)
    expected = torch.einsum("hts,bsh->bth", matrix, u)
    if not reverse:
        expected = expected + leaves["skip"] * u
        start = torch.view_as_complex(leaves["initial_state"])
        seen = torch.einsum("hn,bhn,hnl->blh", c * torch.exp(z), start, torch.exp(z[..., None] * times)).real
        expected = expected + seen
        last = torch.exp(length * z) * start + torch.einsum(
            "hn,blh,hnl->bhn", b, u.to(b.dtype), torch.exp(z[..., None] * times.flip(0))
        )
    for backend in ("reference", "torch"):
        with seqmodels.backend(backend):
            y, final = diagonal_ssm(**leaves, reverse=reverse)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        if not reverse:
            torch.testing.assert_close(torch.view_as_complex(final), last, rtol=1e-11, atol=1e-11)


def test_torch_form_in_float64():
    for name, kind, case in problems(2, 3):
        truth = run(case, kind, "reference", torch.float64)
        for key, value in run(case, kind, "torch", torch.float64).items():
            # Sums over a few hundred terms of size 1, whose states may hold hundreds of them.
            torch.testing.assert_close(
                value, truth[key], rtol=1e-11, atol=1e-9, msg=lambda m, k=key, c=name: f"{c} {k}: {m}"
            )


def test_torch_form_in_float32():
    for name, kind, case in problems(2, 3):
        case = rounded(case)
        low, truth = run(case, kind, "reference", torch.float32), run(case, kind, "reference", torch.float64)
        check_against(run(case, kind, "torch", torch.float32), low, truth, name)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_kernels(level):
    with at_level(level):  # 21 heads, 5 modes: whole blocks and rests at every level
        for name, kind, case in problems(21, 5):
            case = rounded(case)
            low, truth = run(case, kind, "reference", torch.float32), run(case, kind, "reference", torch.float64)
            check_against(run(case, kind, "cpu", torch.float32), low, truth, name)


@needs_extension
def test_the_bound_catches_a_wrong_decay():
    case = rounded(problem("over two chunks", 3, 5, None, "zero state"))
    low, truth = run(case, "", "reference", torch.float32), run(case, "", "reference", torch.float64)
    case[0]["z"][..., 1] += 1e-4
    with pytest.raises(AssertionError, match="from the float64 definition"):
        check_against(run(case, "", "cpu", torch.float32), low, truth, "wrong")


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_phase_does_not_drift_over_a_long_sequence(backend):
    """Modes that hardly decay over 16,384 tokens: the float32 recurrence loses its phase, the backends must not.

    A chunk may lose 64 roundings of e^z, the sum over the past as many as it has terms, in the mean their root.
    """
    heads, modes, length = 2, 4, 16384
    turns = 130 * torch.rand(heads, modes, dtype=torch.float64)
    z = torch.stack((torch.full_like(turns, -1e-4), turns), -1)
    u, b, c = torch.randn(1, length, heads), torch.randn(heads, modes, 2), torch.randn(heads, modes, 2)
    weight = torch.view_as_real(torch.view_as_complex(b.double()) * torch.view_as_complex(c.double()))
    exact, _ = long_conv(u.double(), vandermonde(z, weight, length))
    with seqmodels.backend(backend):
        y, _ = diagonal_ssm(u, z, b, c)
    error = ((y.double() - exact).norm() / exact.norm()).item()
    assert error < 64 * torch.finfo(torch.float32).eps, error
    # What the correction is for: the rounded decays alone, to the power of the tokens.
    decay = torch.exp(torch.view_as_complex(z))
    drifted = decay.to(torch.complex64).to(torch.complex128)
    assert ((drifted**length / decay**length) - 1).abs().max() > 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [None, Layout.packed([[2, 1], [3]], 4, capacity=4)])
def test_gradcheck(backend, kind, layout):
    documents = 2 if layout is None else 4
    shapes = [(2, 4, 2), (2, 2, 2), (2, 2, 2), (3, 2, 2, 2)]
    if kind != "reverse":
        shapes.append((3, 2))
    if kind == "initial state":
        shapes.append((documents, 2, 2, 2))
    leaves = [0.5 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    names = ("u", "z", "b", "c", "skip", "initial_state")

    def function(*values):
        given = dict(zip(names, values, strict=False))
        return tuple(v for v in diagonal_ssm(**given, layout=layout, reverse=kind == "reverse") if v is not None)

    with seqmodels.backend(backend):
        assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=needs_extension)])
def test_opcheck(backend):
    layout = Layout.packed([[2, 3], [4]], 6)
    for packed, state, reverse in ((False, False, False), (True, True, False), (True, False, True)):
        documents = (layout.starts, layout.lengths) if packed else (None, None)
        leaves = [
            torch.randn(2, 6, 2), -torch.rand(2, 3, 2, dtype=torch.float64), torch.randn(2, 3, 2),
            torch.randn(2, 2, 3, 2), torch.randn(2, 2), torch.randn(3, 2, 3, 2) if state else None,
        ]  # fmt: skip
        args = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
        torch.library.opcheck(torch.ops.seqmodels.diagonal_ssm.default, (*args, *documents, reverse, backend))
    step = (torch.randn(4, 3), *(torch.randn(3, 5, 2) for _ in "ab"), torch.randn(2, 3, 5, 2), torch.randn(2, 3))
    args = (*step, torch.randn(4, 3, 5, 2), backend)
    torch.library.opcheck(torch.ops.seqmodels.diagonal_ssm_step.default, args)


STEP_BACKENDS = ["reference", "torch", pytest.param("cpu", marks=needs_extension)]


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize(("heads", "modes", "rows"), [(3, 2, 1), (33, 37, 2), (16, 32, 1)])
def test_steps_give_the_whole(backend, heads, modes, rows):
    leaves, _, _ = problem("below a chunk", heads, modes, rows, "initial state")
    with seqmodels.backend("reference"):
        y, final = diagonal_ssm(**leaves)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    decay = torch.view_as_real(torch.exp(torch.view_as_complex(leaves["z"]))).to(dtype)
    b, c, skip = (leaves[name].to(dtype) for name in ("b", "c", "skip"))
    signed = c * torch.tensor([1.0, -1.0], dtype=dtype)
    state = leaves["initial_state"].to(dtype).clone()
    with seqmodels.backend(backend):
        steps = [diagonal_ssm_step(decay, b, signed, skip, u_t, state) for u_t in leaves["u"].to(dtype).unbind(1)]
    # 37 steps multiply by decays with one rounding each; y is a sum over the modes.
    epsilon = 37 * torch.finfo(dtype).eps
    for found, truth in ((torch.stack(steps, 1), y), (state, final)):
        assert (found - truth).abs().max() <= epsilon * truth.abs().max()


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_step_at_every_level(level):
    with at_level(level):
        test_steps_give_the_whole("cpu", 33, 37, 2)


@needs_extension
def test_results_do_not_depend_on_the_number_of_threads():
    case = rounded(problem("packed", 50, 3, 2, "initial state"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, "", "cpu", torch.float32)
        torch.set_num_threads(3)
        three = run(case, "", "cpu", torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[key], three[key]) for key in one)


def test_where_the_scan_pays_off():
    u = torch.randn(1, 4, 2)
    assert pays_off(u, 32, 2) == (extension.load() is None)
    assert not pays_off(u, 65, 1)
    assert not pays_off(u.double(), 32, 1)
    with seqmodels.backend("torch"):
        assert not pays_off(u, 32, 1)
    elsewhere = u.to("meta")
    assert not pays_off(elsewhere, 32, 1)
    assert not pays_off(elsewhere, 32, 1, Layout.packed([[4]]))
    assert pays_off(elsewhere, 32, 1, Layout.packed([[1, 3]]))
    on_gpu = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    assert pays_off(on_gpu, 64, 2) == (backends.missing("triton") is None)
    assert not pays_off(on_gpu, 65, 2)
    with seqmodels.backend("torch"):
        assert not pays_off(on_gpu, 32, 1)


def test_compiles_without_a_break():
    def function(u, z, b, c):
        return diagonal_ssm(u.sin(), z, b, c)[0].cos()

    u, b, c = torch.randn(2, 5, 3), torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    z = -torch.rand(3, 2, 2, dtype=torch.float64)
    expected = function(u, z, b, c)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(u, z, b, c), expected)


def test_bad_input():
    u, z, b, c = torch.randn(2, 5, 3), torch.randn(3, 2, 2), torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    state = torch.randn(2, 3, 2, 2)
    for arguments, keywords, error, message in (
        ((u[0], z, b, c), {}, ValueError, r"u has shape \(5, 3\)"),
        ((u, z[:2], b, c), {}, ValueError, r"z has shape \(2, 2, 2\); expected \(3, modes, 2\)"),
        ((u, z, b[:, :1], c), {}, ValueError, r"b has shape \(3, 1, 2\)"),
        ((u, z, b, c[:, :1]), {}, ValueError, r"c has shape \(3, 1, 2\)"),
        ((u, z, b, c), {"skip": torch.randn(2)}, ValueError, r"skip has shape \(2,\)"),
        ((u, z, b, c), {"initial_state": state[:1]}, ValueError, r"initial_state has shape \(1, 3, 2, 2\)"),
        ((u, z, b, c), {"initial_state": state, "reverse": True}, ValueError, "neither skip nor initial_state"),
        ((u, z, b, c), {"layout": Layout.full(2, 4)}, ValueError, r"grid of \(2, 4\)"),
        ((u, z, b.double(), c), {}, TypeError, "b is torch.float64 beside an input of torch.float32"),
        ((u.half(), z, b.half(), c.half()), {}, TypeError, "expected float32 or float64"),
    ):
        with pytest.raises(error, match=message):
            diagonal_ssm(*arguments, **keywords)
    step = (z, b, c[None], torch.randn(1, 3))
    with pytest.raises(ValueError, match="contiguous"):
        diagonal_ssm_step(*step, torch.randn(2, 3), state.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match=r"c \(3, 2, 2\)"):
        diagonal_ssm_step(z, b, c, step[3], torch.randn(2, 3), state)


@needs_extension
def test_cpu_kernels_refuse_float64_by_name():
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in ((1, 2, 3), (3, 2, 2), (3, 2, 2), (3, 2, 2))]
    with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="take float32"):
        diagonal_ssm(*arguments)
