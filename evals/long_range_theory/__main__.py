"""``python -m evals.long_range_theory``: compute every topic, or draw the page of what was computed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.long_range_theory",
        description=__doc__,
        epilog="exit status: 0, 1 when a value is not the known one, 2 for wrong arguments",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results.jsonl and of the page")
    parser.add_argument("--topics", nargs="+", metavar="TOPIC", help="only these")
    parser.add_argument("--report", type=Path, nargs="+", metavar="DIR", help="draw the page into the first")
    options = parser.parse_args(arguments)
    try:
        if options.report:
            from evals.long_range_theory.report import write_report

            print(f"wrote {write_report(options.report[0], options.report)}")
            return 0
        if options.out is None:
            parser.error("give --out DIR, or --report DIR")
        return _run(options.out, options.topics)
    except (ValueError, FileNotFoundError) as error:
        print(f"evals.long_range_theory: {error}", file=sys.stderr)
        return 2


def _run(folder: Path, names: list[str] | None) -> int:
    from evals.long_range_theory.measures import TOPICS
    from evals.long_range_theory.report import SUITE, write_report
    from evals.results import Results
    from seqmodels.configuration import nearest

    known = {topic.__name__: topic for topic in TOPICS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown topic {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    results = Results(folder, SUITE)
    wrong = []
    for name in names or known:
        count = 0
        for finding in known[name]():
            config = {**finding.config, "topic": name, "holds": finding.holds}
            if finding.known:
                config |= {"known": finding.known, "tolerance": finding.tolerance, "below": finding.below}
            results.write(finding.case, finding.metric, finding.value, "", config=config)
            count += 1
            if not finding.holds:
                wrong.append(finding)
        print(f"{name}: {count} values, {sum(f.case.startswith(name) for f in wrong)} wrong", flush=True)
    for finding in wrong:
        print(f"WRONG: {finding.case}, {finding.metric}: {finding.value:.10g}; known {finding.known}")
    print(f"wrote {write_report(folder, [folder])}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
