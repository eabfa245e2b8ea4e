"""The Triton kernels of the linear recurrence under the interpreter (TRITON_INTERPRET=1), in float32."""

from __future__ import annotations

import pytest
import torch
from linear_recurrence_cases import cases, run
from two_times_rule import check_against

from seqmodels.ops.linear_recurrence import triton_segments


@pytest.mark.parametrize("grid", ["one token", "prime", "short packed"])
def test_kernels(grid):
    for number, case in enumerate(cases(1, torch.float32, (grid,))):
        if grid != "prime" or number % 2:  # scans are slow to interpret
            low, truth = run(case, "reference"), run(case, "reference", torch.float64)
            check_against(run(case, "triton"), low, truth, case.name)


@pytest.mark.parametrize(("grid", "numbers"), [("short packed", (1, 2, 7)), ("over a tile", (5,))])
def test_kernels_in_segments(grid, numbers, monkeypatch):
    """Segments that end inside documents and tiles, and a last one that is shorter; scans are slow to interpret."""
    monkeypatch.setattr(triton_segments, "plan", lambda x, programs: _segments(x.shape[1]))
    for number, case in enumerate(cases(1, torch.float32, (grid,))):
        if number in numbers:
            low, truth = run(case, "reference"), run(case, "reference", torch.float64)
            check_against(run(case, "triton"), low, truth, case.name)


def _segments(length: int) -> tuple[int, int]:
    """Of a third of the tokens and a bit; the recurrence over the segments has none of its own."""
    return (length, 1) if length < 9 else (length // 3 + 1, 3)


def test_plan():
    """From the device's multiprocessors (132 of an H100 here): enough programs, segments that are long enough."""
    x = torch.empty(1, 32768, 64, 2, device="meta")
    for programs in (1, 4, 32, 200):
        segment, count = triton_segments.plan(x, programs)
        assert count * segment >= 32768 > (count - 1) * segment
        assert segment >= 256
        assert count * programs >= 132 or segment == 256
    assert triton_segments.plan(x, 300) == (32768, 1)
    assert triton_segments.plan(x[:, :500], 1) == (500, 1)
