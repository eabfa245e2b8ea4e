"""Runs a CUDA source on host threads: each block's threads are real ones, ``__syncthreads`` a barrier.

It checks what a kernel computes and that its barriers are met by all; it says nothing of speed, of memory
models or of nvcc. Fit for sources that use shared memory, barriers and plain launches, nothing more.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

PRELUDE = """
#include <pthread.h>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static thread_local dim3 threadIdx;
static dim3 blockIdx, gridDim;
static pthread_barrier_t block_barrier;
#define __syncthreads() pthread_barrier_wait(&block_barrier)
typedef void* cudaStream_t;
typedef int cudaError_t;
static int cudaGetLastError() { return 0; }
static const char* cudaGetErrorString(int) { return ""; }
template <class Kernel, class... Arguments>
void launch_on_host(Kernel kernel, dim3 grid, dim3 block, Arguments... arguments) {
  pthread_barrier_init(&block_barrier, nullptr, block.x * block.y);
  gridDim = grid;
  for (unsigned bz = 0; bz < grid.z; ++bz) for (unsigned by = 0; by < grid.y; ++by)
  for (unsigned bx = 0; bx < grid.x; ++bx) {
    blockIdx = dim3(bx, by, bz);
    std::vector<std::thread> threads;
    for (unsigned y = 0; y < block.y; ++y) for (unsigned x = 0; x < block.x; ++x) {
      threads.emplace_back([=] { threadIdx = dim3(x, y); kernel(arguments...); });
    }
    for (auto& thread : threads) thread.join();
  }
  pthread_barrier_destroy(&block_barrier);
}
"""


def build(source: Path, exports: str, folder: Path, compiler: str) -> Path:
    """A shared library of ``source`` and of ``exports``, C++ code behind it."""
    code = source.read_text().replace("#include <cuda_runtime.h>", "")
    code = re.sub(r"__launch_bounds__\([^)]*\)", "", code)
    code, launches = re.subn(r"(\w+)<<<(.*), (\w+), 0, stream>>>\(", r"launch_on_host(\1, \2, \3, ", code)
    assert launches
    (folder / "host.cpp").write_text(PRELUDE + code + exports)
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{source.parent}"]
    subprocess.run([*command, str(folder / "host.cpp"), "-o", str(folder / "host.so")], check=True)
    return folder / "host.so"
