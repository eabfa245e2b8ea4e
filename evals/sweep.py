"""Runs cells as processes of one thread each, keeps what finished, and goes on where a killed run stopped.

A cell is a struct that holds everything its run needs. Its process (``command``) reads it as JSON on its
input and writes one JSON object a line: messages of progress, and at last ``{"outcome": ...}``.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from evals.results import Results, read

ROOT = Path(__file__).resolve().parents[1]

# glibc gives freed blocks above 128 KiB back to the system, and the next step of training takes them again page by
# page: a fifth of a small model's step. With these a process keeps what it has had, in large pages where there are
# some. Other C libraries ignore them; what the user has set in the environment wins.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in (("mmap_threshold", 1 << 32), ("trim_threshold", 1 << 32), ("hugetlb", 1))
    )
}


def thread_limits(threads: int) -> dict[str, str]:
    """Variables that give a process so many threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


class Cell(Protocol):
    """One run."""

    @property
    def digest(self) -> str:
        """Of the whole content: a finished cell is kept when a suite is started again with the same one."""
        ...

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def seed(self) -> int: ...


C = TypeVar("C", bound=Cell)
R = TypeVar("R")
ShownCell = TypeVar("ShownCell", bound=Cell, contravariant=True)
ShownRun = TypeVar("ShownRun", contravariant=True)


class Display(Protocol[ShownCell, ShownRun]):
    """Who is told what happens (:mod:`evals.sweep_display`)."""

    def plan(self, cells: Sequence[ShownCell]) -> None: ...
    def progress(self, cell: ShownCell, message: dict[str, Any]) -> None: ...
    def done(self, cell: ShownCell, run: ShownRun, kept: bool) -> None: ...
    def failed(self, cell: ShownCell, reason: str) -> None: ...


class Usage(NamedTuple):
    """Of the cells that ran.

    Attributes:
        processor: seconds of their processes.
        occupied: wall seconds of the cells, added up.
        wall: seconds of the sweep.
        jobs: cells at a time.
    """

    processor: float
    occupied: float
    wall: float
    jobs: int

    @property
    def share(self) -> float:
        """Of the cores given, what the cells computed on; other work on the machine takes from it."""
        return self.processor / (self.wall * self.jobs) if self.wall else 0.0

    @property
    def filled(self) -> float:
        """Of the cores given, what was never without a cell."""
        return self.occupied / (self.wall * self.jobs) if self.wall else 0.0


class Sweep(Generic[C, R]):
    """Cells of one suite into one results file.

    Args:
        command: starts a cell's process.
        results: where rows go.
        jobs: processes at a time.
        display: hears of everything, from one thread at a time.
        write: writes the rows of a finished cell from what its process said.
        collect: rows to finished runs by digest.
        about: of a failed cell, what its row says beside the reason.
        environment: of the process in slot 0..jobs-1, beside one thread and memory that is kept (a GPU's number).
    """

    def __init__(
        self,
        command: Sequence[str],
        results: Results,
        jobs: int,
        display: Display[C, R],
        *,
        write: Callable[[Results, C, dict[str, Any]], Any],
        collect: Callable[[Iterable[Mapping[str, Any]]], dict[str, R]],
        about: Callable[[C], dict[str, Any]],
        environment: Callable[[int], dict[str, str]] = lambda slot: {},
    ) -> None:
        self.command, self.results, self.jobs, self.display = list(command), results, jobs, display
        self.write, self.collect, self.about, self.environment = write, collect, about, environment
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.usage = Usage(0.0, 0.0, 0.0, jobs)
        self.occupied = 0.0

    def run(self, cells: Sequence[C]) -> dict[str, R]:
        """Those of ``cells`` that finished, now or in an earlier run into the same folder, by digest.

        A cell holds everything that repeats it, so that it stays finished over later commits; its rows
        name the commit they were made at.
        """
        kept = self.collect(read(self.results.path))
        for cell in cells:
            if cell.digest in kept:
                self.display.done(cell, kept[cell.digest], kept=True)
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.jobs):
            slots.put(slot)
        began, processor = time.monotonic(), _children_seconds()
        executor = ThreadPoolExecutor(self.jobs)
        waiting = [executor.submit(self._run, cell, slots) for cell in cells if cell.digest not in kept]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            with self.lock:
                self.stopped = True
                for process in self.processes:
                    process.terminate()
            raise
        finally:
            executor.shutdown(cancel_futures=True)
        if waiting:
            self.usage = Usage(
                self.usage.processor + _children_seconds() - processor,
                self.occupied,
                self.usage.wall + time.monotonic() - began,
                self.jobs,
            )
        finished = self.collect(read(self.results.path))
        return {cell.digest: finished[cell.digest] for cell in cells if cell.digest in finished}

    def _run(self, cell: C, slots: queue.SimpleQueue[int]) -> None:
        slot, began = slots.get(), time.monotonic()
        environment = {**KEEP_MEMORY, **os.environ, **thread_limits(1), **self.environment(slot)}
        with self.lock:
            if self.stopped:
                return
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=ROOT, env=environment,
            )  # fmt: skip
            self.processes.add(process)
        try:
            outcome, errors = _follow(process, cell, self._progress)
        finally:
            process.kill()
            process.wait()
            slots.put(slot)
            with self.lock:
                self.occupied += time.monotonic() - began
                self.processes.discard(process)
        with self.lock:
            if self.stopped:
                return
            if outcome is None:
                reason = errors.strip().splitlines()[-1] if errors.strip() else f"exit status {process.returncode}"
                config = {**self.about(cell), "reason": reason, "digest": cell.digest}
                self.results.write(cell.name, "failed", None, "", layer=cell.layer, seed=cell.seed, config=config)
                self.display.failed(cell, reason)
                return
            run = self.collect(self.write(self.results, cell, outcome))[cell.digest]
            self.display.done(cell, run, kept=False)

    def _progress(self, cell: C, message: dict[str, Any]) -> None:
        with self.lock:
            self.display.progress(cell, message)


def _follow(
    process: subprocess.Popen[str], cell: C, progress: Callable[[C, dict[str, Any]], None]
) -> tuple[dict[str, Any] | None, str]:
    """Feeds the cell, passes its messages on, and returns its outcome and what it wrote to stderr."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda stream=process.stderr: errors.append(stream.read()))
    reader.start()
    outcome = None
    try:
        process.stdin.write(msgspec.json.encode(cell).decode())
        process.stdin.close()
        for line in process.stdout:
            message = json.loads(line)
            if "outcome" in message:
                outcome = message["outcome"]
            else:
                progress(cell, message)
    except BrokenPipeError:  # it died before it had read its cell; stderr says why
        pass
    process.wait()
    reader.join()
    return (outcome if process.returncode == 0 else None), "".join(errors)


def _children_seconds() -> float:
    """Processor seconds of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
