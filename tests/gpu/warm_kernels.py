"""Compiles the kernels that the GPU check launches, on all cores at once: ``python tests/gpu/warm_kernels.py``.

Triton compiles one kernel after the other in the process that launches it, most of the check's time on an empty
cache. Each process here takes one example of an op in one dtype and with one tile, and runs it; what it
compiled lies in Triton's cache for all. Whether results are right is the check's business, not this one's.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as pytest's pythonpath
TILES = (None, 0, 1, 2, 3)
# Long compilations first, so that none is left for the end.
HEAVY = ("feature_attention", "feature_state", "linear_attention", "mamba3", "sparse_attention", "diagonal_ssm")


class Task(NamedTuple):
    op: str
    dtype: str
    tile: int | None
    example: int


def tasks() -> list[Task]:
    """Every example of every op with Triton kernels, in every dtype and with every shipped tile."""
    import torch

    from seqmodels.ops.examples import EXAMPLES, Draw
    from seqmodels.ops.registration import OPERATORS

    found = []
    for op in (name for name in EXAMPLES if "triton" in OPERATORS[name].modules):
        for dtype in ("float32", "bfloat16", "float16"):
            count = len(EXAMPLES[op](Draw(getattr(torch, dtype), "cpu")))
            tiles = TILES[: 1 if dtype == "float16" else None]  # the check times no tiles in float16
            found += [Task(op, dtype, tile, example) for tile in tiles for example in range(count)]
    random.Random(0).shuffle(found)  # neighbours share kernels, and would compile them twice
    return sorted(found, key=lambda task: (task.op not in HEAVY, task.tile is not None))


def prepare() -> None:
    """Registers the operators."""
    import seqmodels.ops

    for module in pkgutil.iter_modules(seqmodels.ops.__path__, "seqmodels.ops."):
        if module.ispkg:
            importlib.import_module(module.name)


def compile_for(task: Task) -> str | None:
    """Runs one problem; what went wrong, or None."""
    import torch

    from seqmodels.ops import canary
    from seqmodels.ops.examples import EXAMPLES, Draw
    from seqmodels.ops.kernels import choosing_tiles
    from seqmodels.ops.registration import OPERATORS

    def choice(spec, variant, dtype):
        shipped = spec.shipped_tiles(variant, dtype)
        return shipped[task.tile] if task.tile is not None and task.tile < len(shipped) else None

    canary.refusal = lambda *_: None
    try:
        for length in (131, 1):
            device = torch.device("cuda", 0)
            arguments = EXAMPLES[task.op](Draw(getattr(torch, task.dtype), device, length=length))
            if task.example < len(arguments):
                with choosing_tiles(choice):
                    canary.results(OPERATORS[task.op], "triton", arguments[task.example])
    except NotImplementedError:
        return None  # the kernels do not take this problem
    except Exception as error:
        return f"{task}: {type(error).__name__}: {str(error)[:300]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--seconds", type=float, default=200, help="stop then; the check compiles what is left")
    options = parser.parse_args()
    prepare()
    start, waiting, failed = time.monotonic(), tasks(), 0
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with context.Pool(options.processes, initializer=prepare) as pool:
        runs = pool.imap_unordered(compile_for, waiting)
        for done in range(len(waiting)):
            try:
                failure = runs.next(timeout=max(0.1, options.seconds - (time.monotonic() - start)))
            except multiprocessing.TimeoutError:
                print(f"stopped after {done} of {len(waiting)} problems", flush=True)
                break
            if failure is not None:
                failed += 1
                print(failure, flush=True)
        pool.terminate()
    print(f"{len(waiting)} problems, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
