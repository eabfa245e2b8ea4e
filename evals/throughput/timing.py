"""Interleaved timing: A B C C B A, round after round, medians over the samples, warm-up apart.

CPU: a wall-clock sample counts only where all other processes together used less than 12% of the
machine (``/proc/stat`` less our own time). With one thread the process's own CPU time stands in where
the machine is never quiet; with more there is no substitute, and the case is recorded as not
measured. Two threads on a busy two-core machine have read 70 times too long.

GPU: CUDA events around several launches on rotating inputs that exceed the L2 cache; calls below
50 us are captured in a graph that goes through all input sets, so that launches cost nothing.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evals.throughput.problem import Contestant

QUIET = 0.12
ROUNDS = 3
SAMPLE_SECONDS = 0.1
SLOW_SECONDS = 8.0
GRAPH_BELOW_SECONDS = 50e-6


@dataclass
class Timing:
    """Samples of one contestant, in seconds a call.

    Attributes:
        first_call: the first call, with compilation and allocation.
        wall: accepted wall-clock samples (CPU) or event samples (GPU).
        process: CPU time of this process in every sample; empty on a GPU.
    """

    first_call: float = 0.0
    wall: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    clock: str = "wall"
    calls_per_sample: int = 1
    note: str = ""

    @property
    def samples(self) -> list[float]:
        return self.process if self.clock == "process" else self.wall

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def spread(self) -> float:
        """(p80 - p20) / median: a difference smaller than this is noise."""
        return (self.quantile(0.8) - self.quantile(0.2)) / self.median

    def describe(self) -> dict[str, Any]:
        milliseconds = {"p20": self.quantile(0.2), "p80": self.quantile(0.8), "first_call": self.first_call}
        if self.wall:
            milliseconds["wall"] = statistics.median(self.wall)
        if self.process:
            milliseconds["process"] = statistics.median(self.process)
        config: dict[str, Any] = {f"{name}_ms": round(1e3 * value, 6) for name, value in milliseconds.items()}
        config |= {"clock": self.clock, "samples": len(self.samples), "calls_per_sample": self.calls_per_sample}
        config |= {"spread": round(self.spread, 4)} | ({"note": self.note} if self.note else {})
        return config


class Busy(RuntimeError):
    """Other processes kept the machine busy."""


def time_all(contestants: Sequence[Contestant], inputs: Sequence[Any], device: torch.device) -> dict[str, Timing]:
    """Times every contestant on the same input sets; a contestant that raises is left to the caller."""
    if device.type == "cuda":
        return _time_gpu(contestants, inputs)
    return _time_cpu(contestants, inputs)


# ---- CPU


def _time_cpu(contestants: Sequence[Contestant], inputs: Sequence[Any]) -> dict[str, Timing]:
    timings = {contestant.name: _warm_up(contestant, inputs) for contestant in contestants}
    fast = [contestant for contestant in contestants if timings[contestant.name].first_call < SLOW_SECONDS]
    slow = [contestant for contestant in contestants if contestant not in fast]
    accepted = 0
    for attempt in range(2 * ROUNDS):
        quiet = _round([*fast, *reversed(fast)], inputs, timings)
        accepted += quiet
        if accepted == ROUNDS or (attempt >= ROUNDS - 1 and torch.get_num_threads() == 1):
            break
    for contestant in slow:  # one sample: minutes a call leave no room for rounds
        _round([contestant], inputs, timings)
        timings[contestant.name].note = "one sample: the call takes too long for rounds"
    for name, timing in timings.items():
        timing.clock = "wall" if len(timing.wall) >= min(2 * ROUNDS, len(timing.process)) else "process"
        if timing.clock == "process" and torch.get_num_threads() > 1:
            raise Busy(
                f"{name}: other processes used more than {QUIET:.0%} of the machine in every round; "
                "stop them, or measure with --threads 1"
            )
    clocks = {timing.clock for timing in timings.values()}
    if len(clocks) > 1:  # ratios need one clock for all
        for timing in timings.values():
            timing.clock = "process"
    return timings


def _warm_up(contestant: Contestant, inputs: Sequence[Any]) -> Timing:
    start = time.perf_counter()
    contestant.run(inputs[0])
    timing = Timing(first_call=time.perf_counter() - start)
    if timing.first_call >= SLOW_SECONDS:
        return timing
    start = time.perf_counter()
    contestant.run(inputs[-1])
    once = max(time.perf_counter() - start, 1e-7)
    timing.calls_per_sample = max(1, min(10_000, round(SAMPLE_SECONDS / once)))
    return timing


def _round(order: Sequence[Contestant], inputs: Sequence[Any], timings: dict[str, Timing]) -> bool:
    """One sample for every entry of ``order``; its wall times count only if the machine was quiet."""
    walls = []
    meter = QuietMeter()
    for contestant in order:
        timing = timings[contestant.name]
        start, start_process = time.perf_counter(), time.process_time()
        for call in range(timing.calls_per_sample):
            contestant.run(inputs[call % len(inputs)])
        timing.process.append((time.process_time() - start_process) / timing.calls_per_sample)
        walls.append((timing, (time.perf_counter() - start) / timing.calls_per_sample))
    quiet = meter.others() < QUIET
    if quiet:
        for timing, wall in walls:
            timing.wall.append(wall)
    return quiet


class QuietMeter:
    """How much of the machine other processes use, from its making on."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = _busy_seconds(), time.process_time(), time.perf_counter()

    def others(self) -> float:
        """Share of all cores; 0 where there is no /proc/stat to ask."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return 0.0
        elapsed = max(time.perf_counter() - self._start, 1e-3)
        other = (busy - self._busy) - (time.process_time() - self._own)
        return max(0.0, other) / (elapsed * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _idle, _iowait, interrupts, soft, steal = map(int, path.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


# ---- GPU


def _time_gpu(contestants: Sequence[Contestant], inputs: Sequence[Any]) -> dict[str, Timing]:
    timings, runs = {}, {}
    for contestant in contestants:
        timings[contestant.name], runs[contestant.name] = _prepare_gpu(contestant, inputs)
    for _ in range(ROUNDS):
        for contestant in [*contestants, *reversed(contestants)]:
            timing = timings[contestant.name]
            timing.wall.append(_events(runs[contestant.name], timing.calls_per_sample))
    return timings


def _prepare_gpu(contestant: Contestant, inputs: Sequence[Any]) -> tuple[Timing, Callable[[], int]]:
    """First call, warm-up, choice between plain launches and a graph. The callable returns its number of calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    contestant.run(inputs[0])
    torch.cuda.synchronize()
    timing = Timing(first_call=time.perf_counter() - start, clock="events")

    def all_inputs() -> int:
        for one in inputs:
            contestant.run(one)
        return len(inputs)

    all_inputs()
    once = _events(all_inputs, 1)
    if once < GRAPH_BELOW_SECONDS * 4:  # launches hide what the device needs: the graph decides
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                all_inputs()
        except Exception as error:  # autograd over captured code and rivals that read on the host
            torch.cuda.synchronize()
            timing.note = f"no graph: {type(error).__name__}"
        else:
            timing.note = "graph replay"

            def replay() -> int:
                graph.replay()
                return len(inputs)

            timing.calls_per_sample = max(1, round(0.02 / max(_events(replay, 1) * len(inputs), 1e-6)))
            return timing, replay
    timing.calls_per_sample = max(1, min(50, round(0.05 / max(once * len(inputs), 1e-6))))
    return timing, all_inputs


def _events(run: Callable[[], int], repeats: int) -> float:
    """Seconds of one call, from ``repeats`` times ``run``."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    calls = sum(run() for _ in range(repeats))
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call needs beyond what was allocated before it; None where it cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_back_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _give_back_free_memory() -> None:
    """Memory that the C library keeps after a free would hide what the next call needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
