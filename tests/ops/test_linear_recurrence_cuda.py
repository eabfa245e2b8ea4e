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
#define GRID const float* a, const float* s, const int64_t* d, const unsigned char* f, int64_t b, int64_t l, \\
             int64_t c, bool v, bool z
extern "C" int forward(GRID, const float* x, float* h) {
  return seqmodels::linear_recurrence_forward({a, s, d, f, b, l, c, v, z}, x, h, nullptr);
}
extern "C" int backward(GRID, const float* h, const float* g, const float* e, float* x, float* y) {
  return seqmodels::linear_recurrence_backward({a, s, d, f, b, l, c, v, z}, h, g, e, x, y, nullptr);
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

    def grid(decay, x, state, document, flags):
        flag = [ctypes.c_bool(decay.dim() == x.dim()), ctypes.c_bool(x.dim() == 4)]
        return [*pointers(decay, state, document, flags), *(ctypes.c_int64(size) for size in x.shape[:3]), *flag]

    def forward(decay, x, state, document, flags):
        h = torch.empty_like(x)
        assert library.forward(*grid(decay, x, state, document, flags), *pointers(x, h)) == 0
        return h

    def backward(grad_h, grad_final, decay, h, state, document, flags):
        grad_x = torch.empty_like(h)
        grad_decay = h.new_empty(h.shape if decay.dim() == h.dim() else h.shape[:1] + h.shape[2:])
        gradients = pointers(h, grad_h, grad_final, grad_x, grad_decay)
        assert library.backward(*grid(decay, h, state, document, flags), *gradients) == 0
        return grad_decay, grad_x

    stand_in = SimpleNamespace(linear_recurrence=forward, linear_recurrence_backward=backward)
    monkeypatch.setattr(torch.ops, "seqmodels_cuda", stand_in, raising=False)


@pytest.mark.usefixtures("kernels_on_host")
@pytest.mark.parametrize(
    ("grid", "channels"), [("one token", 3), ("over a tile", 3), ("short packed", 3), ("packed", 3), ("two tokens", 40)]
)
def test_kernels_on_host_threads(grid, channels):
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
    assert len(rows) == 24  # forward and backward, real and complex, constant and varying, three targets
    assert [failure for row in rows for failure in row.failures] == []
