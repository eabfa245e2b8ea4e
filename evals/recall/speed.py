"""The training loop of the suite against a straightforward eager loop around the same layers in plain PyTorch.

Both train the same model on the same examples with the same optimiser settings, in turns, on the cores that this
process may use. The suite's way: a process of one thread for each core, this library's kernels, norm and logits at
labelled positions only, data resident as one tensor, fused AdamW, the loss read once an epoch, memory that the process
keeps. The eager way: one process with a thread for each core, the layers' plain PyTorch form, a DataLoader, norm and
logits at every position, cross-entropy that ignores the unlabelled ones, AdamW as it comes, and the loss read at each
step.

Two ratios: examples per second on all cores, and examples per processor second where both ways have one thread. The
second does not depend on what else the machine does, and leaves out what a thread for each core loses by waiting.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from evals.recall.cell import Trainer, build_model
from evals.recall.data import make
from evals.recall.suites import Cell, grid_cells, load_suite
from evals.results import Results
from evals.sweep import KEEP_MEMORY, ROOT, thread_limits
from seqmodels.backends import backend

SUITE, TASK = "cpu", "mqar"
ROUNDS, STEPS, WARM = 5, 8, 2
TARGET = 2.0  # examples a second of the suite's loop over the eager one's


class Rates(NamedTuple):
    """Examples per second, of wall and of processor time."""

    wall: float
    processor: float


def measure(results: Results, arms: Sequence[str]) -> int:
    """Writes two rows an arm: medians over rounds of the ratios. 1 when one on all cores is below 2."""
    cores = sorted(os.sched_getaffinity(0))
    below = []
    for cell in grid_cells(SUITE, load_suite(SUITE, [TASK], arms)):
        if cell.seed:
            continue
        suite = [_Worker(cell, "suite", {core}, 1) for core in cores]
        eager, single = _Worker(cell, "eager", set(cores), len(cores)), _Worker(cell, "eager", {cores[0]}, 1)
        for worker in (*suite, eager, single):
            worker.answer()  # warm
        rounds = [_round(suite, eager, single) for _ in range(ROUNDS)]
        for worker in (*suite, eager, single):
            worker.close()
        about = {"cores": len(cores), "rounds": ROUNDS, "steps": STEPS, "cell": msgspec.to_builtins(cell)}
        found = []
        for index, metric in enumerate(("examples_per_second_ratio", "examples_per_processor_second_ratio")):
            ours, theirs = ([one[index][side] for one in rounds] for side in (0, 1))
            found.append(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)))
            results.write(
                f"speed/{TASK}/{cell.arm}", metric, found[-1], "x", layer=cell.layer, backend="auto", seed=cell.seed,
                config={**about, "suite": ours, "eager": theirs, "load": os.getloadavg()[0]},
                rival="eager PyTorch loop",
            )  # fmt: skip
        print(f"{cell.arm}: {found[0]:.2f}x on {len(cores)} cores, {found[1]:.2f}x by processor time", flush=True)
        if found[0] < TARGET:
            below.append(cell.arm)
    if below:
        print(f"below {TARGET:g}x: {', '.join(below)}")
    return 1 if below else 0


def _round(suite: list[_Worker], eager: _Worker, single: _Worker) -> tuple[tuple[float, float], tuple[float, float]]:
    """(suite, eager) examples per second on all cores, and per processor second with one thread, in turns."""
    for worker in suite:
        worker.ask()
    ours = [worker.answer() for worker in suite]
    eager.ask()
    theirs = eager.answer()
    single.ask()
    alone = single.answer()
    return (sum(one.wall for one in ours), theirs.wall), (ours[0].processor, alone.processor)


class _Worker:
    """A process that trains ``STEPS`` steps each time it is asked, and answers with its examples per second; its first
    answer says that it is warm."""

    def __init__(self, cell: Cell, way: str, cores: set[int], threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "evals.recall.speed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env={**(KEEP_MEMORY if way == "suite" else {}), **os.environ, **thread_limits(threads)},
        )  # fmt: skip
        self._say({"cell": msgspec.to_builtins(cell), "way": way, "cores": sorted(cores), "threads": threads})

    def ask(self) -> None:
        self._say({})

    def answer(self) -> Rates:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a training process of the speed suite ended with status {self.process.wait()}")
        return Rates(*json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()


class _SuiteLoop:
    """What a cell of the suite does between two evaluations."""

    def __init__(self, cell: Cell) -> None:
        self.trainer = Trainer(cell, lambda message: None)

    def steps(self) -> None:
        self.trainer.epoch(0)


class _EagerLoop:
    """What one writes first."""

    def __init__(self, cell: Cell) -> None:
        self.plan, self.size = cell.training, cell.training.batch_size
        torch.manual_seed(cell.seed)
        self.model = build_model(cell)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=cell.learning_rate, betas=self.plan.betas, weight_decay=cell.weight_decay
        )
        examples = make(cell, cell.train[0], "train", (0, 0))
        tensors = (torch.from_numpy(array).long() for array in examples)
        self.loader = DataLoader(TensorDataset(*tensors), batch_size=self.size, shuffle=True)

    def steps(self) -> None:
        with backend("torch"):
            self.model.train()
            losses = []
            for tokens, targets in self.loader:
                self.optimizer.zero_grad()
                hidden, _ = self.model(tokens)
                loss = F.cross_entropy(self.model.logits(self.model.norm(hidden)).flatten(0, 1), targets.flatten())
                loss.backward()
                if self.plan.gradient_clip is not None:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.gradient_clip)
                self.optimizer.step()
                losses.append(loss.item())


def main() -> int:
    """A worker: reads its cell, then trains each time a line comes."""
    first = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, first["cores"])
    torch.set_num_threads(first["threads"])
    cell = msgspec.convert(first["cell"], Cell)
    data = msgspec.structs.replace(cell.train[0], count=STEPS * cell.training.batch_size)
    training = msgspec.structs.replace(cell.training, seconds=None)
    cell = msgspec.structs.replace(cell, train=(data,), training=training)
    loop = {"suite": _SuiteLoop, "eager": _EagerLoop}[first["way"]](cell)
    for _ in range(WARM):
        loop.steps()
    print([0.0, 0.0], flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loop.steps()
        print([data.count / (time.perf_counter() - wall), data.count / (time.process_time() - processor)], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
