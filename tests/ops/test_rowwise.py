"""RMSNorm and SwiGLU's elementwise part: every backend, instruction set and remainder, both ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqmodels
from seqmodels.backends import BackendUnavailable, missing
from seqmodels.ops.extension import capability, capability_name
from seqmodels.ops.rms_norm import rms_norm
from seqmodels.ops.swiglu import swiglu

BEST = None if missing("cpu") else capability_name()
LEVELS = ["default", "avx2", "avx512"][: 1 + ["default", "avx2", "avx512"].index(BEST)] if BEST else []
EPSILON = 1e-5


def norm_case(rows: int, width: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    inputs = [3 * torch.randn(rows, width), 1 + 0.3 * torch.randn(width)]
    return lambda x, weight: rms_norm(x, weight, EPSILON), [tensor.to(dtype) for tensor in inputs]


def swiglu_case(rows: int, width: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    return swiglu, [(4 * torch.randn(rows, 2 * width)).to(dtype)]


def both_ways(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, backend: str) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with seqmodels.backend(backend):
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("case", [norm_case, swiglu_case])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_kernel(level: str, dtype: torch.dtype, case: Callable) -> None:
    """Within twice the error of PyTorch's own chain in the same dtype, against the float64 definition."""
    for rows, width in ((1, 1), (3, 16), (65, 33), (130, 192), (7, 250)):
        torch.manual_seed(rows)
        function, inputs = case(rows, width, dtype)
        grad = torch.randn(rows, width).to(dtype)
        exact = both_ways(function, [tensor.double() for tensor in inputs], grad, "reference")
        plain = both_ways(function, inputs, grad, "torch")
        with capability(level):
            ours = both_ways(function, inputs, grad, "cpu")
        for y, own, other in zip(exact, ours, plain, strict=True):
            assert own.dtype == dtype
            allowed = 2 * (other.double() - y).abs().max() + torch.finfo(dtype).eps * y.abs().max()
            assert (own.double() - y).abs().max() <= allowed, (rows, width)


@pytest.mark.parametrize("case", [norm_case, swiglu_case])
def test_reference(case: Callable) -> None:
    function, inputs = case(4, 6, torch.float64)
    grad = torch.randn(4, 6, dtype=torch.float64)
    for backend in ("reference", "torch"):
        with seqmodels.backend(backend):
            assert torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in inputs])
    for own, other in zip(*(both_ways(function, inputs, grad, name) for name in ("reference", "torch")), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-13, atol=1e-14)


def test_extreme_gates() -> None:
    """No NaN where the exponential overflows, and a NaN that is given comes out."""
    hidden = torch.tensor([[-1e30, -200.0, 200.0, float("nan"), 1.0, 1.0, 1.0, 1.0]])
    for backend in ("torch", *(("cpu",) if LEVELS else ())):
        with seqmodels.backend(backend):
            torch.testing.assert_close(swiglu(hidden), torch.tensor([[0.0, 0.0, 200.0, float("nan")]]), equal_nan=True)


@pytest.mark.skipif(not LEVELS, reason="the extension is not built")
def test_same_bits_for_any_number_of_threads() -> None:
    function, inputs = norm_case(1000, 192, torch.float32)
    grad, threads = torch.randn(1000, 192), torch.get_num_threads()
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(both_ways(function, inputs, grad, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck() -> None:
    for backend in ("reference", "torch", "auto"):
        hidden = torch.randn(2, 3, 8, requires_grad=True)
        torch.library.opcheck(torch.ops.seqmodels.swiglu.default, (hidden, backend))
        x = torch.randn(3, 2, 8).transpose(0, 1).requires_grad_()
        weight = torch.ones(8, requires_grad=True)
        torch.library.opcheck(torch.ops.seqmodels.rms_norm.default, (x, weight, EPSILON, backend))


def test_large_and_small_inputs_agree() -> None:
    """A decode step takes PyTorch's own calls, a sequence the kernels."""
    x, weight = torch.randn(64, 256), torch.randn(256)
    torch.testing.assert_close(rms_norm(x, weight, EPSILON)[:1], rms_norm(x[:1], weight, EPSILON))
    torch.testing.assert_close(rms_norm(x, weight, EPSILON), F.rms_norm(x, (256,), weight, EPSILON))
    torch.testing.assert_close(swiglu(x)[:1], swiglu(x[:1]))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"2 \* width"):
        swiglu(torch.randn(3, 5))
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(torch.randn(3, 5), torch.ones(4), EPSILON)
    with pytest.raises(TypeError, match="expected one dtype"):
        rms_norm(torch.randn(3, 5), torch.ones(5, dtype=torch.float64), EPSILON)
    if LEVELS:
        with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="float64"):
            swiglu(torch.randn(3, 6, dtype=torch.float64))
