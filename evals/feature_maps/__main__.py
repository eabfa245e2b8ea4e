"""``python -m evals.feature_maps``: measure every map, or draw the page of what was measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.feature_maps",
        description=__doc__,
        epilog="exit status: 0, 1 when the order of the maps is not the known one, 2 for wrong arguments",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of results.jsonl and the page; finished cells are kept"
    )
    parser.add_argument("--report", type=Path, nargs="+", metavar="DIR", help="draw the page into the first")
    options = parser.parse_args(arguments)
    try:
        if options.report:
            from evals.feature_maps.report import write_report

            print(f"wrote {write_report(options.report[0], options.report)}")
            return 0
        if options.out is None:
            parser.error("give --out DIR, or --report DIR")
        return _run(options.out)
    except (ValueError, FileNotFoundError) as error:
        print(f"evals.feature_maps: {error}", file=sys.stderr)
        return 2


def _run(folder: Path) -> int:
    from evals.feature_maps.cells import SUITE, cells, config, measure
    from evals.feature_maps.controls import judge
    from evals.feature_maps.report import load, write_report
    from evals.results import Results

    results = Results(folder, SUITE)
    done = results.finished("entropy")  # written last, so that a killed cell is measured again
    every = list(cells())
    for number, cell in enumerate(every, 1):
        if cell.case in done:
            continue
        found = measure(cell)
        for metric in sorted(found, key=lambda name: name == "entropy"):
            unit = "" if metric == "monotonicity" else "nats"
            results.write(cell.case, metric, found[metric], unit, seed=cell.seed, config=config(cell))
        print(f"{number}/{len(every)} {cell.case}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
    verdicts = judge(load([folder]))
    for text, holds in verdicts:
        print(f"{'holds' if holds else 'FAILS'}: {text}")
    print(f"wrote {write_report(folder, [folder])}")
    return 0 if all(holds for _, holds in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
