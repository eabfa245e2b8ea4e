"""The Triton kernels of the short convolution under the interpreter (TRITON_INTERPRET=1), in float32."""

from __future__ import annotations

import pytest
import torch
from short_conv_cases import GRIDS, cases, check, run

import seqmodels
from seqmodels.ops.short_conv import short_conv_step


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_kernels_are_within_their_rounding_bound(width):
    names = ("three tokens", "packed", "left padded") if width == 4 else ("three tokens", "packed")
    for case in cases(width, 70, torch.float32, {name: GRIDS[name] for name in names}):
        if width != 4 and "bias=False" in case.name:
            continue
        check(case, run(case, "triton"), run(case, "reference", torch.float64))


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_step(width, activation):
    x, weight, bias = torch.randn(3, 300), torch.randn(300, width), torch.randn(300)
    state = torch.randn(3, width - 1, 300)
    expected_state = state.clone()
    with seqmodels.backend("reference"):
        expected = short_conv_step(x, weight, bias, expected_state, activation=activation)
    with seqmodels.backend("triton"):
        y = short_conv_step(x, weight, bias, state, activation=activation)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(state, expected_state)
