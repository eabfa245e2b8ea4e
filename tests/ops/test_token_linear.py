"""The linear map of a decode step: every backend, instruction set and remainder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqmodels
from seqmodels.backends import missing
from seqmodels.ops.extension import capability, capability_name
from seqmodels.ops.token_linear import apply_linear, token_linear

BEST = None if missing("cpu") else capability_name()
LEVELS = ["default", "avx2", "avx512"][: 1 + ["default", "avx2", "avx512"].index(BEST)] if BEST else []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_kernel(level: str, dtype: torch.dtype, bias: bool) -> None:
    """A sum of n products rounds n times: at most n roundings of the sum of their sizes, and one of the output."""
    for rows in (1, 2, 3, 4, 5, 7, 9) if dtype == torch.float32 else (1, 3):
        for inner, out in ((1, 1), (3, 17), (16, 16), (33, 5), (64, 50)):
            x, weight = torch.randn(rows, inner).to(dtype), torch.randn(out, inner).to(dtype)
            shift = torch.randn(out).to(dtype) if bias else None
            exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
            size = x.double().abs() @ weight.double().abs().T + (0 if shift is None else shift.double().abs())
            with seqmodels.backend("cpu"), capability(level):
                y = token_linear(x, weight, shift)
            allowed = size * inner * 2.0**-23 + exact.abs() * torch.finfo(dtype).eps
            assert ((y.double() - exact).abs() <= allowed + 1e-12).all(), (rows, inner, out)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_plain_backends(backend: str) -> None:
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5), (7, 5), (7,)))
    with seqmodels.backend(backend):
        torch.testing.assert_close(token_linear(x, weight, bias), x @ weight.T + bias)


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.seqmodels.token_linear.default, (torch.randn(2, 5), torch.randn(3, 5), None, "auto")
    )


def test_autocast() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token_linear(x, weight).dtype == torch.bfloat16


def test_modules_that_are_not_plain_are_called() -> None:
    """An adapter or a hook must not be passed by."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x, doubled, plain = torch.randn(2, 4), Doubled(4, 3), nn.Linear(4, 3)
    torch.testing.assert_close(apply_linear(doubled, x), doubled(x))
    torch.testing.assert_close(apply_linear(plain, x), plain(x))
    plain.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(apply_linear(plain, x), plain(x))


def test_bad_input() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="expected"):
        token_linear(x[0], weight)
    with pytest.raises(ValueError, match="bias is"):
        token_linear(x, weight, torch.randn(4))
    with pytest.raises(TypeError, match="expected one dtype"):
        token_linear(x, weight.double())
