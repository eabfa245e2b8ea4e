"""Runs a training run to its end while killing it; started by test_resume_after_kill.py.

Every attempt is a forked child that trains with ``resume`` and is ended by SIGKILL: at a random
moment, or by its own hand right before the n-th call of a function that writes a checkpoint. Prints
one JSON line: how many attempts were killed and which checkpoints they left.

Usage: killed_runs.py FOLDER random SEED | killed_runs.py FOLDER writing
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from training_cases import tiny_config

from seqmodels.models import LanguageModel
from seqmodels.tasks.shuffle import raw_draws
from seqmodels.training import checkpoint as checkpoint_module
from seqmodels.training import loop

torch.set_num_threads(1)

# Calls of an attempt before which it dies. None but the last two lets the first checkpoint come to be,
# so that each of them meets it: before each of its files is written, before each is flushed, before the
# rename; then after the rename, and in the deletion of an old checkpoint.
MOMENTS = [("save_file", 1), ("save_file", 2), ("save_file", 3), *(("fsync", count) for count in range(2, 8))]
MOMENTS += [("replace", 2), ("fsync", 8), ("rmtree", 4)]


def tiny_model_imports(folder: Path) -> None:
    """Imports what children need once, before they are forked, without starting a thread."""
    import matplotlib.pyplot  # noqa: F401

    LanguageModel(tiny_config(folder).model)


def attempt(folder: Path, before: tuple[str, int] | None) -> int:
    """Forks a child that trains; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        if before is not None:
            kill_before(*before)
        run = folder / "run"
        loop.train(tiny_config(folder), run, resume=(run / "config.yaml").exists())
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(3)


def kill_before(name: str, count: int) -> None:
    """Kills this process right before call ``count`` of a function that the checkpoint writer uses."""
    owner = {"save_file": checkpoint_module, "fsync": os, "replace": os, "rmtree": shutil}[name]
    plain, calls = getattr(owner, name), 0

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **keywords)

    setattr(owner, name, counted)


def main(folder: Path, kind: str, seed: int) -> None:
    killed, seen = 0, set()
    tiny_model_imports(folder)
    for number in range(100):
        before = MOMENTS[number] if kind == "writing" and number < len(MOMENTS) else None
        child = attempt(folder, before)
        if kind == "random":
            # The pauses grow, so that early attempts die before the first checkpoint and the last one ends.
            time.sleep(0.1 * (number + 1) * (int(raw_draws(seed, number, count=1)[0]) % 1000) / 1000)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        checkpoints = folder / "run" / "checkpoints"
        seen |= {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            raise SystemExit(f"attempt {number} failed with status {os.WEXITSTATUS(status)}")
        elif kind == "random" or before is None:
            break
    else:
        raise SystemExit("the run did not end in 100 attempts")
    print(json.dumps({"killed": killed, "seen": sorted(seen)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
