"""The long convolution: the FFT form against the definition, and the op's contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from two_times_rule import check_against

import seqmodels
from seqmodels import Layout
from seqmodels.ops.long_conv import long_conv
from seqmodels.ops.long_conv.sizes import fft_size

GRIDS = {
    "one token": (2, 1, None),
    "two tokens": (2, 2, None),
    "prime": (1, 37, None),
    "packed": (3, 40, Layout.packed([[3, 1, 30], [2], [17, 23]], 40, capacity=8)),
    "left padded": (3, 20, Layout.left_padded([3, 20, 1])),
    "empty": (1, 5, Layout.packed([[]], 5, capacity=2)),
}
MODES = ("causal", "bidirectional", "initial state")


def inputs(grid: str, rows: int | None, taps: int, mode: str, dtype: torch.dtype) -> tuple[dict, Layout | None]:
    batch, length, layout = GRIDS[grid]
    documents = batch if layout is None else layout.num_documents
    channels, tail = 3, () if rows is None else (rows,)
    x = torch.randn(batch, length, channels, dtype=dtype)
    if layout is not None:
        x[~layout.valid] = float("nan")
    tensors = {"x": x, "kernel": torch.randn(*tail, channels, taps, dtype=dtype)}
    if mode == "bidirectional":
        tensors["reverse_kernel"] = torch.randn(*tail, channels, taps + 1, dtype=dtype)
    if mode == "initial state":
        tensors["initial_state"] = torch.randn(documents, 4, channels, dtype=dtype)
    grads = {"y": torch.randn(batch, length, *tail, channels, dtype=dtype)}
    if mode == "initial state":
        grads["final_state"] = torch.randn(documents, 4, channels, dtype=dtype)
    return {"tensors": tensors, "grads": grads}, layout


def run(values: dict, layout: Layout | None, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    leaves = {name: t.to(dtype or t.dtype).clone().requires_grad_() for name, t in values["tensors"].items()}
    with seqmodels.backend(backend):
        y, final = long_conv(**leaves, layout=layout)
        outputs = {"y": y} if final is None else {"y": y, "final_state": final}
        grads = [values["grads"][name].to(output.dtype) for name, output in outputs.items()]
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
    result = {name: output.detach() for name, output in outputs.items()}
    return result | {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_fft_form(grid, mode):
    length = GRIDS[grid][1]
    for rows, taps in itertools.product((None, 2), (1, 3, length, length + 5)):
        values, layout = inputs(grid, rows, taps, mode, torch.float64)
        truth = run(values, layout, "reference")
        for key, value in run(values, layout, "torch").items():
            torch.testing.assert_close(value, truth[key], rtol=1e-11, atol=1e-11)
        values, layout = inputs(grid, rows, taps, mode, torch.float32)
        low, truth = run(values, layout, "reference"), run(values, layout, "reference", torch.float64)
        found = run(values, layout, "torch")
        # Transforms mix all values: an entry's error is that of the largest, whose sum has the most terms.
        check_against(found, low, truth, f"{grid}, {mode}, {rows=}, {taps=}")


@pytest.mark.parametrize("rows", [None, 2])
def test_definition_against_a_dense_matrix(rows):
    """Section 3 of the specification: both sums as one Toeplitz matrix."""
    length, channels = 7, 2
    tail = () if rows is None else (rows,)
    kernel, reverse = (torch.randn(*tail, channels, length, dtype=torch.float64) for _ in range(2))
    x = torch.randn(1, length, channels, dtype=torch.float64)
    matrix = torch.zeros(*tail, channels, length, length, dtype=torch.float64)
    for t, s in itertools.product(range(length), repeat=2):
        matrix[..., t, s] = kernel[..., t - s] if s <= t else reverse[..., s - t - 1]
    expected = torch.einsum("...cts,sc->t...c", matrix, x[0])
    for backend in ("reference", "torch"):
        with seqmodels.backend(backend):
            y, final = long_conv(x, kernel, reverse_kernel=reverse)
        assert final is None
        torch.testing.assert_close(y[0], expected, rtol=1e-12, atol=1e-12)


def test_the_bound_catches_a_circular_convolution():
    values, layout = inputs("prime", None, 37, "causal", torch.float32)
    low, truth = run(values, layout, "reference"), run(values, layout, "reference", torch.float64)
    x, kernel = values["tensors"]["x"], values["tensors"]["kernel"]
    y = torch.fft.irfft(torch.fft.rfft(x.transpose(1, 2)) * torch.fft.rfft(kernel), n=37).transpose(1, 2)
    with pytest.raises(AssertionError, match="y is"):
        check_against({**low, "y": y}, low, truth, "circular")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [None, Layout.packed([[2, 1], [3]], 4, capacity=4)])
def test_gradcheck(backend, mode, layout):
    documents = 2 if layout is None else 4
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 2), (3, 2, 5))]
    if mode == "bidirectional":
        leaves.append(torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True))
    if mode == "initial state":
        leaves.append(torch.randn(documents, 3, 2, dtype=torch.float64, requires_grad=True))

    def function(x, kernel, other=None):
        keywords = {"causal": {}, "bidirectional": {"reverse_kernel": other}, "initial state": {"initial_state": other}}
        return tuple(out for out in long_conv(x, kernel, layout=layout, **keywords[mode]) if out is not None)

    with seqmodels.backend(backend):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_opcheck(backend):
    layout = Layout.packed([[2, 3], [4]], 6)
    x, kernel = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    state = torch.randn(3, 4, 3, requires_grad=True)
    for args in (
        (x, kernel, None, None, None, None),
        (x, kernel, torch.randn(2, 3, 6, requires_grad=True), None, layout.starts, layout.lengths),
        (x, kernel, None, state, layout.starts, layout.lengths),
    ):
        torch.library.opcheck(torch.ops.seqmodels.long_conv.default, (*args, backend))


def test_split_gives_the_whole():
    x, kernel, start = torch.randn(2, 11, 3), torch.randn(3, 6), torch.randn(2, 5, 3)
    whole, final = long_conv(x, kernel, initial_state=start)
    for cut in (1, 4, 10):
        first, between = long_conv(x[:, :cut], kernel, initial_state=start)
        second, end = long_conv(x[:, cut:], kernel, initial_state=between)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(end, final)


def test_packed_documents_are_each_document_alone():
    layout = Layout.packed([[3, 1, 9], [2, 11]], 14)
    x, kernel = torch.randn(2, 14, 3), torch.randn(3, 14)
    y, _ = long_conv(x, kernel, layout=layout)
    for row, column, size in ((0, 0, 3), (0, 3, 1), (0, 4, 9), (1, 0, 2), (1, 2, 11)):
        alone, _ = long_conv(x[row : row + 1, column : column + size], kernel)
        torch.testing.assert_close(y[row : row + 1, column : column + size], alone, rtol=1e-5, atol=1e-5)
    assert not y[~layout.valid].any()


def test_low_precision_input_is_convolved_in_float32():
    x, kernel = torch.randn(1, 40, 3), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(long_conv(x, kernel)[0], long_conv(x, kernel)[0].float())
        y, _ = long_conv(x.bfloat16(), kernel)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, long_conv(x.bfloat16().float(), kernel)[0].bfloat16())


def test_fft_sizes_are_the_next_even_products_of_small_primes():
    good = sorted(
        2**a * 3**b * 5**c
        for a, b, c in itertools.product(range(1, 14), range(9), range(6))
        if 2**a * 3**b * 5**c < 9000
    )
    for minimum in range(1, 8000):
        assert fft_size(minimum) == next(size for size in good if size >= minimum)


def test_compiles_without_a_break():
    layout = Layout.packed([[2, 3], [4]], 6)
    x, kernel, state = torch.randn(2, 6, 3), torch.randn(3, 6), torch.randn(3, 2, 3)

    def function(x, kernel, state, layout):
        return long_conv(x, kernel, initial_state=state, layout=layout)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(x, kernel, state, layout), function(x, kernel, state, layout), strict=True):
        assert torch.equal(got, wanted)


def test_bad_input():
    x, kernel = torch.zeros(2, 5, 3), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="at least one token"):
        long_conv(x[:, :0], kernel)
    with pytest.raises(ValueError, match=r"kernel has shape \(4, 5\)"):
        long_conv(x, torch.zeros(4, 5))
    with pytest.raises(ValueError, match="reverse_kernel has shape"):
        long_conv(x, kernel, reverse_kernel=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="bidirectional convolution has no initial state"):
        long_conv(x, kernel, reverse_kernel=kernel, initial_state=torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="initial_state has shape"):
        long_conv(x, kernel, initial_state=torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="layout is for a grid"):
        long_conv(x, kernel, layout=Layout.full(2, 4))
    with pytest.raises(TypeError, match="float64 throughout"):
        long_conv(x, kernel.double())
