"""``python -m evals.recall``: train and test every arm, or draw the page of what was measured."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evals.recall.suites import Cell

SPEED = "speed"  # the suite that measures the training loop itself
REAL_TEXT = "real_text"  # the suite of trained models on text


def main(arguments: list[str] | None = None) -> int:
    from evals.recall.suites import suite_names

    parser = argparse.ArgumentParser(
        prog="python -m evals.recall",
        description=__doc__,
        epilog="exit status: 0, 1 when a control fails or a cell could not be run, 2 for wrong arguments",
    )
    names = ", ".join([*suite_names(), SPEED, REAL_TEXT])
    parser.add_argument("--suite", metavar="NAME|FILE", help=f"{names}, or a YAML file of your own")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only these")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these")
    parser.add_argument("--models", nargs="+", default=[], metavar="RUN", help=f"of {REAL_TEXT}: runs, or hf:NAME")
    parser.add_argument("--data", metavar="FOLDER", help=f"of {REAL_TEXT}: TASK.jsonl files; the hub if absent")
    parser.add_argument(
        "--limits", nargs="+", type=int, default=[2048], metavar="TOKENS",
        help=f"of {REAL_TEXT}: tokens that documents are cut to; 2048 if absent, JRT has 512, 1024 and 2048",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, help="cells at a time, a thread each: the cores or GPUs given when absent")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of results.jsonl; finished cells in it are kept")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], metavar="RATE",
        help="try these learning rates for the arms, with a seed and test set that no suite measures with",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--report", type=Path, nargs="+", metavar="DIR", help="draw the page into the first")
    options = parser.parse_args(arguments)
    try:
        if options.report:
            from evals.recall.report import write_report

            print(f"wrote {write_report(options.report[0], options.report)}")
            return 0
        if options.suite is None:
            parser.error("give --suite NAME, or --report DIR")
        if options.jobs is not None and options.jobs < 1:
            parser.error(f"--jobs is {options.jobs}; expected at least 1")
        return _run(options, parser)
    except (ValueError, FileNotFoundError) as error:
        print(f"evals.recall: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch
    from rich.console import Console

    from evals.recall import runner
    from evals.recall.display import LiveTable
    from evals.recall.summary import SUITE, judge, summarise
    from evals.results import Results

    if options.list:
        for cell in _cells(options):
            print(f"{cell.name} seed {cell.seed}")
        return 0
    if options.out is None:
        parser.error("--out DIR is missing")
    if options.suite == REAL_TEXT:
        from evals.recall import real_text

        return real_text.measure(
            Results(options.out, SUITE), options.models, data=options.data, tasks=options.tasks, limits=options.limits
        )
    if options.suite == SPEED:
        from evals.recall.speed import measure

        return measure(Results(options.out, SUITE), options.arms)
    cells = _cells(options)
    needs_gpu = cells[0].device == "cuda"
    gpus = torch.cuda.device_count() if needs_gpu else 0
    if needs_gpu and not gpus:
        raise ValueError(
            f"suite {options.suite!r} needs a GPU and none is visible to torch; on a CPU, --suite cpu takes 40 minutes"
        )
    results = Results(options.out, SUITE)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends: as if Ctrl-C were pressed
    jobs = options.jobs or gpus or len(os.sched_getaffinity(0))
    try:
        with LiveTable(Console()) as display:
            runs, complete, usage = runner.run(cells, results, jobs, display, gpus)
    except KeyboardInterrupt:
        print(f"interrupted; finished cells are in {results.path}, the same command goes on from there")
        return 130
    if usage.wall:
        print(
            f"{usage.wall:.0f} s, {usage.processor:.0f} processor seconds: {usage.share:.0%} of {jobs} cores; "
            f"{usage.filled:.0%} of them had a cell"
        )
    verdicts = judge(summarise(runs))
    for text, holds in verdicts:
        print(f"control {'holds' if holds else 'FAILS'}: {text}")
    if not complete:
        print("some cells could not be run; the same command tries them again")
    return 0 if complete and all(holds for _, holds in verdicts) else 1


def _cells(options: argparse.Namespace) -> list[Cell]:
    from evals.recall.suites import grid_cells, load_suite
    from evals.recall.tuning import tuning_cells

    name, suite = Path(options.suite).stem, load_suite(options.suite, options.tasks, options.arms)
    return tuning_cells(name, suite, options.rates) if options.rates else grid_cells(name, suite)


if __name__ == "__main__":
    sys.exit(main())
