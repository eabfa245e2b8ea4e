"""The Triton kernels of the diagonal SSM under the interpreter (TRITON_INTERPRET=1), in float32."""

from __future__ import annotations

import pytest
import torch
from diagonal_ssm_cases import problem, rounded, run
from two_times_rule import check_against

from seqmodels.ops.diagonal_ssm import streams, triton


@pytest.mark.parametrize(
    ("grid", "heads", "modes", "rows", "kind"),
    [
        ("one token", 1, 1, None, "zero state"),
        ("below a chunk", 5, 17, None, "zero state"),
        ("a chunk", 2, 35, None, "initial state"),
        ("packed", 5, 3, 2, "initial state"),
        ("packed", 5, 3, 2, "reverse"),
    ],
)
def test_kernels(grid, heads, modes, rows, kind):
    case = rounded(problem(grid, heads, modes, rows, kind))
    low, truth = run(case, kind, "reference", torch.float32), run(case, kind, "reference", torch.float64)
    check_against(run(case, kind, "triton", torch.float32), low, truth, f"{grid} {kind}")


@pytest.mark.parametrize(
    ("grid", "modes", "kind"), [("over two chunks", 20, "reverse"), ("left padded", 3, "initial state")]
)
def test_kernels_in_segments(grid, modes, kind, monkeypatch):
    """Segments of two chunks: several a document, the last one shorter, some without a token."""

    def plan(u, starts, lengths):
        documents = u.shape[0] if starts is None else starts.shape[0]
        return streams.Streams(documents, -(-u.shape[1] // 32), 32, u.shape[1], starts, lengths)

    monkeypatch.setattr(triton, "plan", plan)
    case = rounded(problem(grid, 2, modes, None, kind))
    low, truth = run(case, kind, "reference", torch.float32), run(case, kind, "reference", torch.float64)
    check_against(run(case, kind, "triton", torch.float32), low, truth, f"{grid} {kind}")


def test_plan():
    """From the device's multiprocessors (132 of an H100 here): 16 streams a program, segments that are long enough."""
    for heads, rows, length in ((2048, 1, 32768), (64, 1, 32768), (512, 8, 8192), (512, 4096, 512)):
        u = torch.empty(rows, length, heads, device="meta")
        made = streams.plan(u, None, None)
        assert made.segment % 16 == 0
        assert made.segments * made.segment >= length > (made.segments - 1) * made.segment
        assert made.segment >= 128 or made.segments == 1
        programs = -(-made.count // 16) * heads // 4
        assert made.segments == 1 or programs >= 132 or made.segment == 128
    assert streams.plan(torch.empty(1, 200, 4, device="meta"), None, None).segments == 1
