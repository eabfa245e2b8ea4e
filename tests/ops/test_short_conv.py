"""The short convolution: each backend against the definition, and the op's contract."""

from __future__ import annotations

import importlib
import types

import pytest
import torch
from short_conv_cases import GRIDS, cases, check, run

import seqmodels
from seqmodels import Layout
from seqmodels.backends import BackendUnavailable
from seqmodels.ops import extension
from seqmodels.ops.short_conv import short_conv, short_conv_step

needs_extension = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))
LEVELS = ("default", "avx2", "avx512")


def at_level(level: str):
    """The C++ kernels at one instruction set; skips where the machine lacks it."""
    try:
        with extension.capability(level):
            pass
    except RuntimeError as error:
        pytest.skip(str(error))
    return extension.capability(level)


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_form_is_within_its_rounding_bound(width, dtype):
    for case in cases(width, 5, dtype):
        check(case, run(case, "torch"), run(case, "reference", torch.float64))


@needs_extension
@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_kernels_are_within_their_rounding_bound(level, dtype, width):
    # 21 channels: whole vectors and a rest at every level.
    with at_level(level):
        for case in cases(width, 21, dtype):
            check(case, run(case, "cpu"), run(case, "reference", torch.float64))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_kernels_over_several_blocks_of_channels(dtype):
    grids = {name: GRIDS[name] for name in ("odd", "packed over a tile")}
    for case in cases(4, 300, dtype, grids):
        check(case, run(case, "cpu"), run(case, "reference", torch.float64))


def test_the_bound_catches_a_wrong_tap():
    case = next(iter(cases(4, 5, torch.float32, {"odd": GRIDS["odd"]})))
    truth = run(case, "reference", torch.float64)
    case.tensors[1][2, 1] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="exceeds its bound"):
        check(case, run(case, "torch"), truth)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", [None, Layout.packed([[2, 1], [3]], 4, capacity=4)])
def test_gradcheck(backend, activation, layout):
    documents = 2 if layout is None else 4
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4, 3), (3, 3), (3,), (documents, 2, 3))
    ]

    def function(x, weight, bias, state):
        return short_conv(x, weight, bias, initial_state=state, activation=activation, layout=layout)

    with seqmodels.backend(backend):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    layout = Layout.packed([[2, 3], [4]], 6) if packed else None
    starts, lengths = (layout.starts, layout.lengths) if layout else (None, None)
    x, weight = torch.randn(2, 6, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)
    state = torch.randn(3 if packed else 2, 3, 3, requires_grad=True)
    for args in ((x, weight, bias, state), (x, weight, None, None)):
        torch.library.opcheck(torch.ops.seqmodels.short_conv.default, (*args, starts, lengths, True, backend))
    step_args = (torch.randn(2, 3), weight.detach(), bias.detach(), torch.randn(2, 3, 3), True, backend)
    torch.library.opcheck(torch.ops.seqmodels.short_conv_step.default, step_args)


CONTRACT_BACKENDS = [("torch", "default"), *(pytest.param("cpu", level, marks=needs_extension) for level in LEVELS)]


@pytest.mark.parametrize(("backend", "level"), CONTRACT_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_split_and_steps_give_the_whole(backend, level, dtype, width):
    """Taps are added in one order everywhere, so the C++ kernels agree to the last bit of float32."""
    x, weight, bias = torch.randn(2, 11, 21), torch.randn(21, width), torch.randn(21)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    start = torch.randn(2, width - 1, 21)
    close = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    with seqmodels.backend(backend), at_level(level) if backend == "cpu" else seqmodels.backend(backend):
        whole, final = short_conv(x, weight, bias, initial_state=start, activation="silu")
        for cut in (1, 2, 5, 10):
            first, between = short_conv(x[:, :cut], weight, bias, initial_state=start, activation="silu")
            second, end = short_conv(x[:, cut:], weight, bias, initial_state=between, activation="silu")
            torch.testing.assert_close(torch.cat([first, second], 1), whole, **close)
            assert torch.equal(end, final)
        state = start.clone()
        steps = [short_conv_step(x[:, t], weight, bias, state, activation="silu") for t in range(11)]
        torch.testing.assert_close(torch.stack(steps, 1), whole, **close)
        assert torch.equal(state, final)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=needs_extension)])
def test_packed_documents_are_each_document_alone(backend):
    lengths = [[3, 1, 9], [2, 11]]
    layout = Layout.packed(lengths, 14)
    x, weight, bias = torch.randn(2, 14, 6), torch.randn(6, 4), torch.randn(6)
    state = torch.randn(5, 3, 6)
    with seqmodels.backend(backend):
        y, final = short_conv(x, weight, bias, initial_state=state, activation="silu", layout=layout)
        slot = 0
        for row, sizes in enumerate(lengths):
            column = 0
            for size in sizes:
                part = x[row : row + 1, column : column + size]
                alone, end = short_conv(part, weight, bias, initial_state=state[slot : slot + 1], activation="silu")
                torch.testing.assert_close(y[row : row + 1, column : column + size], alone, rtol=1e-6, atol=1e-6)
                assert torch.equal(final[slot], end[0])
                column += size
                slot += 1
        assert not y[~layout.valid].any()


@needs_extension
def test_results_do_not_depend_on_the_number_of_threads():
    case = next(iter(cases(4, 200, torch.float32, {"grid": (2, 700, None)})))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, "cpu")
        torch.set_num_threads(3)
        three = run(case, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[key], three[key]) for key in one)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_silu_of_extreme_values(level):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 200.0, -200.0, 1e30, -1e30, float("nan"), 20.0, -20.0])
    with seqmodels.backend("cpu"), at_level(level):
        y, _ = short_conv(x.view(1, 1, -1), torch.ones(x.numel(), 1), activation="silu")
    expected = torch.nn.functional.silu(x.double()).float()
    torch.testing.assert_close(y.flatten(), expected, rtol=1e-6, atol=1e-35, equal_nan=True)


@needs_extension
def test_strided_inputs_are_read_in_place():
    """A slice of a projection, as layers pass it, gives what its copy gives."""
    wide, weight = torch.randn(2, 9, 12), torch.randn(5, 4)
    for x in (wide[..., 3:8], wide[..., ::2][..., :5], wide.transpose(0, 1)[..., :5]):
        with seqmodels.backend("cpu"):
            assert torch.equal(short_conv(x, weight)[0], short_conv(x.contiguous(), weight)[0])


def test_float32_weights_beside_bfloat16_inputs_keep_their_dtype():
    x = torch.randn(1, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, 4, requires_grad=True)
    y, state = short_conv(x, weight, activation="silu")
    y.float().sum().backward()
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_casts_the_input_and_not_the_weight():
    x, weight = torch.randn(1, 5, 8), torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = short_conv(x, weight)
    expected, _ = short_conv(x.bfloat16(), weight)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(y, expected)


def test_a_change_of_length_recompiles_nothing():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    weight = torch.randn(8, 4)

    def function(x):
        return short_conv(x, weight, activation="silu")[0] * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 6, 17, 64):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(compiled(x), function(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, "batch, length, channels"),
        ({"x": torch.zeros(2, 0, 3)}, ValueError, "at least one token"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, TypeError, "int64"),
        ({"weight": torch.zeros(3, 1, 4)}, ValueError, "squeeze"),
        ({"weight": torch.zeros(4, 4)}, ValueError, r"\(3, width\)"),
        ({"weight": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "float64 throughout"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias .* expected \(3,\)"),
        ({"initial_state": torch.zeros(2, 4, 3)}, ValueError, r"expected \(2, 3, 3\)"),
        ({"initial_state": torch.zeros(2, 3, 3, dtype=torch.bfloat16)}, ValueError, "float32"),
        ({"activation": "gelu"}, ValueError, "gelu"),
        ({"layout": Layout.full(2, 6)}, ValueError, r"\(2, 6\)"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    arguments = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(error, match=message):
        short_conv(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_step_refuses_a_state_it_cannot_update_in_place():
    state = torch.zeros(3, 2, 3).transpose(0, 1)
    with pytest.raises(ValueError, match="not contiguous"):
        short_conv_step(torch.zeros(2, 3), torch.zeros(3, 4), None, state)
    with pytest.raises(ValueError, match=r"expected \(2, 3, 3\)"):
        short_conv_step(torch.zeros(2, 3), torch.zeros(3, 4), None, torch.zeros(2, 4, 3))


@needs_extension
def test_a_backend_asked_for_by_name_never_falls_back():
    x, weight = torch.zeros(1, 2, 8, dtype=torch.float64), torch.zeros(8, 4, dtype=torch.float64)
    with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="float32 and bfloat16"):
        short_conv(x, weight)


@needs_extension
def test_kernels_refuse_documents_outside_the_grid():
    x, weight = torch.zeros(1, 4, 3), torch.zeros(3, 2)
    for start, size in ((0, 5), (2, 3), (-1, 2), (4, 1)):
        with pytest.raises(RuntimeError, match="leaves its row"):
            torch.ops.seqmodels_cpu.short_conv(
                x, weight, None, None, torch.tensor([start]), torch.tensor([size]), False
            )


# ---- causal-conv1d


def stand_in_for_causal_conv1d() -> types.SimpleNamespace:
    """The documented signatures and layout rules of causal-conv1d, computed by torch.

    It checks that we call the package as its documentation asks; it says nothing of the package's kernels.
    """

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                         final_states_out=None, activation=None):  # fmt: skip
        batch, channels, length = x.shape
        assert x.stride(1) == 1
        assert channels % 8 == 0
        assert weight.shape[0] == channels
        assert 2 <= weight.shape[1] <= 4
        assert bias is None or bias.dtype == weight.dtype
        assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, length))
        assert seq_idx is None or initial_states is None
        history = weight.shape[1] - 1
        if initial_states is None:
            initial_states = x.new_zeros(batch, channels, history)
        else:
            assert initial_states.dtype == x.dtype
            assert initial_states.stride(1) == 1
        u = torch.cat([initial_states, x], -1)
        z = torch.zeros_like(x)
        for w in range(history + 1):
            part = u[..., w : w + length]
            lag = history - w
            if seq_idx is not None and lag:
                same = torch.zeros(batch, length, dtype=torch.bool)
                same[:, lag:] = seq_idx[:, lag:] == seq_idx[:, :-lag]
                part = torch.where(same[:, None], part, 0)
            z = z + weight[:, w, None] * part
        z = z if bias is None else z + bias[:, None]
        return z if activation is None else torch.nn.functional.silu(z)

    def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
        assert conv_state.dtype == x.dtype
        u = torch.cat([conv_state, x.unsqueeze(-1)], -1)
        conv_state.copy_(u[..., 1:])
        z = (u * weight).sum(-1)
        z = z if bias is None else z + bias
        return z if activation is None else torch.nn.functional.silu(z)

    return types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update)


@pytest.fixture
def causal_conv1d(monkeypatch):
    package = importlib.import_module("seqmodels.ops.short_conv.causal_conv1d_package")
    stand_in = stand_in_for_causal_conv1d()
    for module in ("cuda", "cuda_step", "causal_conv1d_package"):
        monkeypatch.setattr(f"seqmodels.ops.short_conv.{module}.package_function", lambda name: getattr(stand_in, name))
    return package


@pytest.mark.usefixtures("causal_conv1d")
@pytest.mark.parametrize("width", [2, 3, 4])
def test_causal_conv1d_is_called_as_documented(width):
    cuda = importlib.import_module("seqmodels.ops.short_conv.cuda")
    for case in cases(width, 8, torch.float32):
        starts, lengths = (case.layout.starts, case.layout.lengths) if case.layout else (None, None)
        args = (*case.tensors, starts, lengths, case.activation == "silu")
        if starts is not None and case.tensors[3] is not None:
            assert "not both" in cuda.supports(*args)
            continue
        assert cuda.supports(*args) is None
        y, final = cuda.forward(*args)
        truth = run(case, "reference", torch.float64)
        torch.testing.assert_close(y.double(), truth["y"], rtol=1e-5, atol=1e-5)
        assert torch.equal(final.double(), truth["final_state"])


@pytest.mark.usefixtures("causal_conv1d")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_conv1d_update_writes_our_state(dtype):
    step = importlib.import_module("seqmodels.ops.short_conv.cuda_step")
    x, weight, bias = torch.randn(3, 8).to(dtype), torch.randn(8, 4).to(dtype), torch.randn(8).to(dtype)
    state = torch.randn(3, 3, 8).to(dtype).float()
    expected_state = state.clone()
    with seqmodels.backend("reference"):
        expected = short_conv_step(x, weight, bias, expected_state, activation="silu")
    torch.testing.assert_close(step.forward(x, weight, bias, state, True), expected, rtol=2**-6, atol=2**-6)
    assert torch.equal(state, expected_state)


def test_causal_conv1d_absent_or_unfit_says_so(monkeypatch):
    package = importlib.import_module("seqmodels.ops.short_conv.causal_conv1d_package")
    x, weight = torch.zeros(1, 2, 8), torch.zeros(8, 5)
    if package.package_function("causal_conv1d_fn") is None:
        assert "pip install causal-conv1d" in package.refusal("causal_conv1d_fn", x, weight)
    monkeypatch.setattr(package, "package_function", lambda name: print)
    assert "widths 2 to 4" in package.refusal("causal_conv1d_fn", x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 4, 7])
def test_triton_kernels_on_a_gpu(dtype, width):
    for case in cases(width, 72, dtype):
        truth = run(case, "reference", torch.float64)
        case.tensors = [None if t is None else t.cuda() for t in case.tensors]
        case.grads = [grad.cuda() for grad in case.grads]
        layout, case.layout = case.layout, None if case.layout is None else case.layout.to("cuda")
        result = {key: value.cpu() for key, value in run(case, "triton").items()}
        again = run(case, "triton")
        assert all(torch.equal(result[key], again[key].cpu()) for key in result)
        case.layout = layout
        case.tensors = [None if t is None else t.cpu() for t in case.tensors]
        case.grads = [grad.cpu() for grad in case.grads]
        check(case, result, truth)
