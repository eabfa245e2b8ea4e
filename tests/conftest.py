"""What every test gets: fixed seeds, deterministic algorithms, and NaN in uninitialised memory.

With torch's deterministic mode and ``fill_uninitialized_memory``, ``torch.empty`` (and its C++
stable-ABI counterpart) returns NaN: a kernel that leaves an element unwritten fails its test.
"""

from __future__ import annotations

import logging
import os
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it only

import pytest
import torch

# pytest listens on every logger that does not propagate; on this one that makes torch write out
# each compiled graph as JSON, which triples the time to compile.
logging.getLogger("torch.__trace").propagate = True

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` on a machine without one skips instead of failing."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """After an illegal access a process can use its GPU no more: what follows would fail for that alone.

    Under pytest-xdist the worker ends and another takes over; without it the run stops.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"\n{nodeid} left the GPU unusable for this process: {error}", file=sys.stderr, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the GPU is unusable for this process", returncode=1)
