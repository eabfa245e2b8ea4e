"""What this machine can do at best, measured in the same run: copies and matrix products."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from evals.throughput.problem import DTYPES, Cost


@dataclass(frozen=True)
class Ceilings:
    """Attributes:
    copy: bytes per second of a large copy, read and written bytes together.
    matmul: operations per second of a large matrix product, by dtype.
    """

    copy: float
    matmul: dict[str, float]

    def floor(self, cost: Cost, dtype: str) -> float:
        """Seconds below which the work cannot be done on this machine: the larger of bytes and FLOPs."""
        return max(cost.bytes / self.copy, cost.flops / self.matmul[dtype])

    def binding(self, cost: Cost, dtype: str) -> str:
        return "memory" if cost.bytes / self.copy > cost.flops / self.matmul[dtype] else "compute"


def measure_ceilings(device: torch.device, dtypes: tuple[str, ...]) -> Ceilings:
    """GPU: a 4 GB copy and an 8192-cubed product of random numbers. CPU: 256 MB and 1024 cubed."""
    gpu = device.type == "cuda"
    copy = _copy_rate((1 << 30) if gpu else (1 << 26), device)
    edge = 8192 if gpu else 1024
    matmul = {}
    for name in dtypes:
        left, right = (torch.randn(edge, edge, device=device).to(DTYPES[name]) for _ in range(2))
        matmul[name] = 2 * edge**3 / _best(lambda left=left, right=right: left @ right, device)
    return Ceilings(copy, matmul)


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    return 2 * size * source.element_size() / _best(lambda: target.copy_(source), device)


def _best(run, device: torch.device, repeats: int = 7) -> float:
    """The fastest of several calls: a ceiling is what is possible, not what is usual."""
    run()
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            start = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
            run()
            now = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
            best = min(best, now - start)
    return best
