"""Kernels compiled on all cores before anything is timed.

Triton and Inductor compile what a process launches, one kernel after the other, and keep it in a cache on disk. On
a new machine that is most of a GPU suite's time, so each process here runs some of the cases once, for the cache
alone; what fails does so again, with its row, when it is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import torch

from evals.throughput.problem import Case


def one_of_each(cases: Sequence[Case]) -> list[Case]:
    """The shortest case of each series, in their order: kernels are never specialised on the length."""
    shortest: dict[str, Case] = {}
    for case in cases:
        known = shortest.setdefault(case.series, case)
        if case.length < known.length:
            shortest[case.series] = case
    return list(shortest.values())


def compile_ahead(
    cases: Sequence[Case],
    device: torch.device,
    processes: int,
    seconds: float,
    say: Callable[[str], None] = print,
) -> None:
    """Runs one case of each series on ``processes`` processes, for at most ``seconds``."""
    waiting, start = one_of_each(cases), time.monotonic()
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    done = 0
    with context.Pool(processes, initializer=_limit, initargs=(processes,)) as pool:
        runs = pool.imap_unordered(_worker, [(case, str(device)) for case in waiting])
        while done < len(waiting):
            try:
                runs.next(timeout=max(0.1, seconds - (time.monotonic() - start)))
            except multiprocessing.TimeoutError:
                break
            done += 1
        pool.terminate()
        pool.join()  # their memory is free before anything is timed
    say(f"compiled the kernels of {done} of {len(waiting)} series in {time.monotonic() - start:.0f} s")


def _limit(processes: int) -> None:
    # What rivals find while many processes share the GPU is no tuning: fla keeps no result of it.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(0.95 / processes)


def _worker(task: tuple[Case, str]) -> None:
    case, device = task
    run_once(case, torch.device(device))


def run_once(case: Case, device: torch.device) -> None:
    """Everything of a case that launches kernels: the check of this library's first form, one call of each."""
    from evals.throughput.runner import BUILDERS

    try:
        problem = BUILDERS[case.kind](case, device)
        problem.check(next(contestant for contestant in problem.contestants if contestant.ours))
        tensors = problem.inputs(0)
    except Exception:  # measured, the case says what is wrong
        return
    for contestant in problem.contestants:
        try:
            contestant.run(tensors)
        except Exception:  # its own limit, of which the measured run makes a row
            continue
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
