"""CUDA files go through nvcc, and their spills are seen."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("triton", reason="the disassembler comes with Triton")

from seqmodels.audit.cuda_sources import audit_sources

SOURCE = """
template <int N> __global__ void KERNEL(const float4* x, float* y, long n) {
  __shared__ float tile[256];
  long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i < n) { float4 v = x[i]; tile[threadIdx.x] = v.x + v.y + v.z + v.w; }
  __syncthreads();
  if (i < n) y[i] = tile[threadIdx.x ^ 1];
}
template __global__ void KERNEL<4>(const float4*, float*, long);
"""
SPILLING = """
__global__ void spilling(float* y, const int* order) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = y[i];
  for (int i = 0; i < 64; ++i) kept[order[i]] += kept[order[i + 64]];
  for (int i = 0; i < 64; ++i) y[i] = kept[i];
}
"""


def test_no_files_no_rows(tmp_path):
    assert audit_sources(["sm_90"], folder=tmp_path) == ([], None)


def test_missing_compiler_is_reported(tmp_path, monkeypatch):
    (tmp_path / "sum.cu").write_text(SOURCE.replace("KERNEL", "sum_kernel"))
    monkeypatch.setenv("PATH", "")
    rows, note = audit_sources(["sm_90"], folder=tmp_path)
    assert rows == []
    assert "nvcc is not on the path" in note


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_kernels_are_compiled_for_each_architecture(tmp_path):
    (tmp_path / "good.cu").write_text(SOURCE.replace("KERNEL", "sum_kernel"))
    (tmp_path / "spill.cu").write_text(SPILLING)
    (tmp_path / "broken.cu").write_text("__global__ void broken() { nothing(); }")
    rows, note = audit_sources(["sm_80", "sm_90", "sm_100"], folder=tmp_path)
    assert note is None
    good = {row.target: row for row in rows if row.kernel.endswith("good.cu")}
    assert set(good) == {"sm_80", "sm_90", "sm_100"}
    for row in good.values():
        assert "sum_kernel<4>" in row.variant
        assert row.failures == []
        assert row.resources.shared == 1024
        assert row.resources.vectorised == 1
    spills = [row for row in rows if row.kernel.endswith("spill.cu")]
    assert all("spills 256 bytes" in row.failures[0] and row.resources.local_accesses > 0 for row in spills)
    broken = [row for row in rows if row.kernel.endswith("broken.cu")]
    assert all('"nothing" is undefined' in row.failures[0] for row in broken)
