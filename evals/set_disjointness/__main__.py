"""``python -m evals.set_disjointness``: train and test every model, or draw the page of what was measured."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.set_disjointness",
        description=__doc__,
        epilog="exit status: 0, 1 when a control fails or a cell could not be run, 2 for wrong arguments",
    )
    parser.add_argument("--suite", metavar="NAME", help="cpu (minutes on two cores) or paper (one GPU)")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these: attention, causal, prefix")
    parser.add_argument("--jobs", type=int, help="cells at a time, a thread each; 2 on a CPU, 1 on a GPU unless given")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of results.jsonl; finished cells in it are kept")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--report", type=Path, nargs="+", metavar="DIR", help="draw the page into the first")
    options = parser.parse_args(arguments)
    try:
        if options.report:
            from evals.set_disjointness.report import write_report

            print(f"wrote {write_report(options.report[0], options.report)}")
            return 0
        if options.suite is None:
            parser.error("give --suite cpu or --suite paper, or --report DIR")
        if options.jobs is not None and options.jobs < 1:
            parser.error(f"--jobs is {options.jobs}; expected at least 1")
        return _run(options, parser)
    except (ValueError, FileNotFoundError) as error:
        print(f"evals.set_disjointness: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch
    from rich.console import Console

    from evals.results import Results
    from evals.set_disjointness import runner
    from evals.set_disjointness.suites import ARMS, suite_named
    from evals.set_disjointness.summary import SUITE, judge, points

    suite = suite_named(options.suite)
    unknown = set(options.arms) - set(ARMS)
    if unknown:
        raise ValueError(f"unknown arm {', '.join(sorted(unknown))}; known: {', '.join(ARMS)}")
    cells = [cell for cell in suite.cells(options.suite) if cell.arm in (options.arms or ARMS)]
    if options.list:
        print("\n".join(f"{cell.name} seed {cell.seed}" for cell in cells))
        return 0
    if options.out is None:
        parser.error("--out DIR is missing")
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"suite {options.suite!r} needs a GPU and none is visible to torch; on a CPU, --suite cpu runs in minutes"
        )
    results = Results(options.out, SUITE)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends: as if Ctrl-C were pressed
    jobs = options.jobs or (2 if suite.device == "cpu" else 1)
    try:
        runs, complete = runner.run(cells, results, jobs, Console())
    except KeyboardInterrupt:
        print(f"interrupted; finished cells are in {results.path}, the same command goes on from there")
        return 130
    verdicts = judge(points(runs))
    for text, holds in verdicts:
        print(f"control {'holds' if holds else 'FAILS'}: {text}")
    if not complete:
        print("some cells could not be run; the same command tries them again")
    return 0 if complete and all(holds for _, holds in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
