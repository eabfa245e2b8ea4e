"""Runs cells as processes of one thread each, writes their rows, and goes on where a killed run stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import msgspec

from evals.results import Results, read
from evals.state_tracking.cell import Outcome, build_model
from evals.state_tracking.suites import Cell, Suite, grid_cells, more_seeds
from evals.state_tracking.summary import Run, collect
from seqmodels.tasks.state_tracking import scaled_accuracy, task_named

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "evals.state_tracking.cell")


class Display(Protocol):
    """Who is told what happens (:mod:`evals.state_tracking.display`)."""

    def plan(self, cells: Iterable[Cell]) -> None: ...
    def progress(self, cell: Cell, message: dict[str, Any]) -> None: ...
    def done(self, cell: Cell, run: Run, kept: bool) -> None: ...
    def failed(self, cell: Cell, reason: str) -> None: ...


def run(name: str, suite: Suite, results: Results, jobs: int, display: Display) -> tuple[list[Run], bool]:
    """The grid of every arm, then more seeds at each arm's chosen point: the runs, and whether all finished.

    Raises:
        ValueError: before anything is trained, arguments that a layer refuses.
    """
    pool = _Pool(results, jobs, display)
    cells = grid_cells(name, suite)
    for cell in cells:
        build_model(cell, device="meta")
    display.plan(cells)
    found = pool.run(cells)
    later = []
    for task, plan in suite.tasks.items():
        for arm in suite.arms:
            searched = [cell for cell in cells if (cell.task, cell.arm) == (task, arm)]
            finished = [cell for cell in searched if cell.digest in found]
            if finished:
                chosen = max(finished, key=lambda cell: found[cell.digest].rank)
                later += more_seeds(chosen, plan.grid, searched)
    display.plan(later)
    found |= pool.run(later)
    return list(found.values()), len(found) == len(cells) + len(later)


def write_rows(results: Results, cell: Cell, outcome: Outcome) -> list[dict[str, Any]]:
    """Scaled accuracy at every test length, the validation, and at last the time with all that repeats the cell."""
    rows = []
    chance = task_named(cell.task).chance
    about = {
        "suite": cell.suite, "task": cell.task, "arm": cell.arm, "point": cell.point, "digest": cell.digest,
        "parameters": outcome.parameters, "trained_length": max(stage.max_length for stage in cell.training.stages),
        "published": cell.published, "control": cell.control,
    }  # fmt: skip
    who = {"layer": cell.layer, "backend": "auto", "seed": cell.seed}
    for length, (right, asked) in outcome.test.items():
        value = scaled_accuracy(right / asked, chance)
        config = {**about, "length": length, "answers": asked, "accuracy": right / asked}
        rows.append(results.write(f"{cell.name}/L{length}", "scaled_accuracy", value, "", **who, config=config))
    for metric, value in (
        ("validation_accuracy", scaled_accuracy(outcome.validation_accuracy, chance)),
        ("validation_loss", outcome.validation_loss),
    ):
        config = {**about, "length": cell.training.validation_length, "step": outcome.step}
        unit = "nats" if metric == "validation_loss" else ""
        rows.append(results.write(cell.name, metric, value, unit, **who, config=config))
    everything = {**about, "cell": msgspec.to_builtins(cell)}
    rows.append(results.write(cell.name, "run_time", outcome.seconds, "s", **who, config=everything))
    return rows


class _Pool:
    def __init__(self, results: Results, jobs: int, display: Display) -> None:
        self.results, self.jobs, self.display = results, jobs, display
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, cells: Sequence[Cell]) -> dict[str, Run]:
        """Those of ``cells`` that finished, now or in an earlier run into the same folder, by digest.

        A cell holds everything that repeats it, so that it stays finished over later commits; its rows
        name the commit they were made at.
        """
        kept = collect(read(self.results.path))
        for cell in cells:
            if cell.digest in kept:
                self.display.done(cell, kept[cell.digest], kept=True)
        executor = ThreadPoolExecutor(self.jobs)
        waiting = [executor.submit(self._run, cell) for cell in cells if cell.digest not in kept]
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
        finished = collect(read(self.results.path))
        return {cell.digest: finished[cell.digest] for cell in cells if cell.digest in finished}

    def _run(self, cell: Cell) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with self.lock:
            if self.stopped:
                return
            process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=ROOT, env=environment,
            )  # fmt: skip
            self.processes.add(process)
        try:
            outcome, errors = _follow(process, cell, self._progress)
        finally:
            process.kill()
            with self.lock:
                self.processes.discard(process)
        with self.lock:
            if self.stopped:
                return
            if outcome is None:
                reason = errors.strip().splitlines()[-1] if errors.strip() else f"exit status {process.returncode}"
                config = {"task": cell.task, "arm": cell.arm, "reason": reason, "digest": cell.digest}
                self.results.write(cell.name, "failed", None, "", layer=cell.layer, seed=cell.seed, config=config)
                self.display.failed(cell, reason)
                return
            run = collect(write_rows(self.results, cell, outcome))[cell.digest]
            self.display.done(cell, run, kept=False)

    def _progress(self, cell: Cell, message: dict[str, Any]) -> None:
        with self.lock:
            self.display.progress(cell, message)


def _follow(
    process: subprocess.Popen[str], cell: Cell, progress: Callable[[Cell, dict[str, Any]], None]
) -> tuple[Outcome | None, str]:
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
                test = {int(length): tuple(counts) for length, counts in message["outcome"]["test"].items()}
                outcome = Outcome(**{**message["outcome"], "test": test})
            else:
                progress(cell, message)
    except BrokenPipeError:  # it died before it had read its cell; stderr says why
        pass
    process.wait()
    reader.join()
    return (outcome if process.returncode == 0 else None), "".join(errors)
