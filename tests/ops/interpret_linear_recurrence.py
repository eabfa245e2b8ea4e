"""The Triton kernels of the linear recurrence under the interpreter (TRITON_INTERPRET=1), in float32."""

from __future__ import annotations

import pytest
import torch
from linear_recurrence_cases import cases, run
from two_times_rule import check_against


@pytest.mark.parametrize("grid", ["one token", "prime", "short packed"])
def test_kernels(grid):
    for number, case in enumerate(cases(1, torch.float32, (grid,))):
        if grid != "prime" or number % 2:  # scans are slow to interpret
            low, truth = run(case, "reference"), run(case, "reference", torch.float64)
            check_against(run(case, "triton"), low, truth, case.name)
