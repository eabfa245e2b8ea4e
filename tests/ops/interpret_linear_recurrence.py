"""The Triton kernels of the linear recurrence under the interpreter (TRITON_INTERPRET=1), in float32."""

from __future__ import annotations

import pytest
import torch
from linear_recurrence_cases import cases, run
from two_times_rule import check_against


@pytest.mark.parametrize("grid", ["one token", "prime", "packed"])
def test_kernels(grid):
    for number, case in enumerate(cases(2, torch.float32, (grid,))):
        if grid == "packed" or number % 2:
            low, truth = run(case, "reference"), run(case, "reference", torch.float64)
            check_against(run(case, "triton"), low, truth, case.name)
