"""The Triton kernels of the Vandermonde products under the interpreter (TRITON_INTERPRET=1), in float32."""

from __future__ import annotations

import pytest
import torch
from two_times_rule import check_against
from vandermonde_cases import SIZES, inputs, run


@pytest.mark.parametrize("size", [*SIZES, (1, 2, 3, 4099)])
def test_kernels(size):
    values = inputs(size, torch.float32)
    check_against(run(values, "triton"), run(values, "reference"), run(values, "reference", torch.float64), str(size))
