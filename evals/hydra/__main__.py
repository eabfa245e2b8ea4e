"""``python -m evals.hydra``: measure Hydra's parts, or draw the page of what was measured."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

STUDIES = ("throughput", "routing", "memory", "facts")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.hydra",
        description=__doc__,
        epilog="exit status: 0, 1 when a control fails or a cell could not be run, 2 for wrong arguments",
    )
    parser.add_argument("--suite", metavar="NAME", help="cpu, or smoke (a few steps of each cell)")
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=STUDIES, help="only these (all)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a thread each")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of results.jsonl; finished cells in it are kept")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--report", type=Path, nargs="+", metavar="DIR", help="draw the page into the first")
    options = parser.parse_args(arguments)
    try:
        if options.report:
            from evals.hydra.report import write_report

            print(f"wrote {write_report(options.report[0], options.report)}")
            return 0
        if options.suite is None:
            parser.error("give --suite cpu, or --report DIR")
        if options.jobs < 1:
            parser.error(f"--jobs is {options.jobs}; expected at least 1")
        return _run(options, parser)
    except (ValueError, FileNotFoundError) as error:
        print(f"evals.hydra: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from rich.console import Console

    from evals.hydra import runner
    from evals.hydra.display import LiveTable
    from evals.hydra.report import write_report
    from evals.hydra.suites import suite_cells
    from evals.hydra.summary import SUITE, judge
    from evals.results import Results

    cells = [cell for cell in suite_cells(options.suite) if cell.study in options.study]
    if options.list:
        print("\n".join(f"{cell.name} seed {cell.seed}" for cell in cells))
        return 0
    if options.out is None:
        parser.error("--out DIR is missing")
    results = Results(options.out, SUITE)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends: as if Ctrl-C were pressed
    try:
        with LiveTable(Console()) as display:
            runs, complete = runner.run(cells, results, options.jobs, display)
    except KeyboardInterrupt:
        print(f"interrupted; finished cells are in {results.path}, the same command goes on from there")
        return 130
    if runs:
        print(f"wrote {write_report(options.out, [options.out])}")
    verdicts = judge(runs)
    for text, holds in verdicts:
        print(f"control {'holds' if holds else 'FAILS'}: {text}")
    if not complete:
        print("some cells could not be run; the same command tries them again")
    return 0 if complete and all(holds for _, holds in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
