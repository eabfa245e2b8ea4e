"""The CUDA kernels of the linear recurrence: nvcc's verdict, and their results on host threads, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_host import build
from linear_recurrence_cases import cases, run
from torch import Tensor
from two_times_rule import check_against

from seqmodels.ops.linear_recurrence import cuda

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "linear_recurrence.cu"
EXPORTS = """
#define GRID const float* a, const float* s, const int64_t* d, const unsigned char* f, const float* k, float* p, \\
             float* e, int64_t b, int64_t l, int64_t c, int64_t n, bool v, bool z
#define MADE {a, s, d, f, k, p, e, b, l, c, n, v, z}
extern "C" int forward(GRID, const float* x, float* h) {
  return seqmodels::linear_recurrence_forward(MADE, x, h, nullptr);
}
extern "C" int backward(GRID, const float* h, const float* g, const float* o, float* x, float* y) {
  return seqmodels::linear_recurrence_backward(MADE, h, g, o, x, y, nullptr);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    return ctypes.CDLL(str(build(SOURCE, EXPORTS, folder, compiler)))


@pytest.fixture
def kernels_on_host(library, monkeypatch):
    """torch.ops.seqmodels_cuda with the same schema as csrc/cuda/linear_recurrence.cpp."""

    def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p | None]:
        return [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]

    def grid(decay, x, state, document, flags, segment, carry=None, maps=(None, None)):
        flag = [ctypes.c_bool(decay.dim() == x.dim()), ctypes.c_bool(x.dim() == 4)]
        sizes = [ctypes.c_int64(size) for size in (*x.shape[:3], segment)]
        return [*pointers(decay, state, document, flags, carry, *maps), *sizes, *flag]

    def of_segments(x, segment):
        return x.new_empty((x.shape[0], -(-x.shape[1] // segment), *x.shape[2:]))

    def forward(decay, x, state, document, flags, carry, segment):
        h = torch.empty_like(x)
        assert library.forward(*grid(decay, x, state, document, flags, segment, carry), *pointers(x, h)) == 0
        return h

    def forward_ends(decay, x, state, document, flags, segment):
        maps = of_segments(x, segment), of_segments(x, segment)
        given = grid(decay, x, state, document, flags, segment, maps=maps)
        assert library.forward(*given, *pointers(x, None)) == 0
        return maps

    def backward(grad_h, grad_final, decay, h, state, document, flags, carry, segment):
        grad_x = torch.empty_like(h)
        grad_decay = torch.empty_like(h) if decay.dim() == h.dim() else of_segments(h, segment)
        gradients = pointers(h, grad_h, grad_final, grad_x, grad_decay)
        assert library.backward(*grid(decay, h, state, document, flags, segment, carry), *gradients) == 0
        return grad_decay, grad_x

    def backward_ends(grad_h, grad_final, decay, document, flags, segment):
        maps = of_segments(grad_h, segment), of_segments(grad_h, segment)
        given = grid(decay, grad_h, None, document, flags, segment, maps=maps)
        assert library.backward(*given, *pointers(None, grad_h, grad_final, None, None)) == 0
        return maps

    stand_in = SimpleNamespace(
        linear_recurrence=forward,
        linear_recurrence_ends=forward_ends,
        linear_recurrence_backward=backward,
        linear_recurrence_backward_ends=backward_ends,
    )
    monkeypatch.setattr(torch.ops, "seqmodels_cuda", stand_in, raising=False)


@pytest.mark.usefixtures("kernels_on_host")
@pytest.mark.parametrize(
    ("grid", "channels"), [("one token", 3), ("over a tile", 3), ("short packed", 3), ("packed", 3), ("two tokens", 40)]
)
def test_kernels_on_host_threads(grid, channels):
    check(grid, channels)


@pytest.mark.usefixtures("kernels_on_host")
@pytest.mark.parametrize(("grid", "channels"), [("over a tile", 3), ("short packed", 3)])
def test_kernels_on_host_threads_in_segments(grid, channels, monkeypatch):
    """Segments that end inside documents and tiles, and a last one that is shorter."""
    monkeypatch.setattr(cuda, "plan", lambda x, blocks: _segments(x.shape[1]))
    check(grid, channels)


def _segments(length):
    """Of a third of the tokens and a bit; the recurrence over the segments has none of its own."""
    return (length, 1) if length < 9 else (length // 3 + 1, 3)


def check(grid, channels):
    for case in cases(channels, torch.float32, (grid,)):
        decay, x, state = case.tensors
        documents = (None, None) if case.layout is None else (case.layout.starts, case.layout.lengths)
        h, final = cuda.forward(decay, x, state, *documents)
        gradients = cuda.backward(*case.grads, decay, x, state, *documents, h, final)
        found = {"h": h, "final_state": final, "grad_decay": gradients[0], "grad_x": gradients[1]}
        if state is not None:
            found["grad_state"] = gradients[2]
        check_against(found, run(case, "reference"), run(case, "reference", torch.float64), case.name)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_kernels_compile_without_spills():
    pytest.importorskip("triton", reason="the disassembler comes with Triton")
    from seqmodels.audit.cuda_sources import audit_sources

    rows, note = audit_sources(["sm_80", "sm_90", "sm_100"], workers=2)
    rows = [row for row in rows if row.kernel.endswith("linear_recurrence.cu")]
    assert note is None
    # forward and backward, real and complex, constant and varying, states and segments' maps, three targets
    assert len(rows) == 48
    assert [failure for row in rows for failure in row.failures] == []
