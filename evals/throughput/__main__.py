"""``python -m evals.throughput``: measure, or draw the page of what was measured."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.throughput", description=__doc__)
    parser.add_argument("--suite", choices=("cpu", "gpu"), help="which machine to measure")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="names, layers or patterns (*decode*)")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="stop before then; 500 for gpu, 900 for cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more than 1 needs a quiet machine")
    parser.add_argument(
        "--compile", type=int, metavar="N", help="processes that compile GPU kernels first; 0: none; default: cores - 4"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results.jsonl")
    parser.add_argument("--list", action="store_true", help="print the suite's cases and stop")
    parser.add_argument("--report", type=Path, nargs="+", metavar="DIR", help="draw the page into the first")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="with --report: rewrite the headline in this file")
    options = parser.parse_args(arguments)
    if options.report:
        from evals.throughput.report import update_readme, write_report

        print(f"wrote {write_report(options.report[0], options.report)}")
        if options.readme is not None:
            update_readme(options.readme, options.report)
            print(f"wrote the headline in {options.readme}")
        return 0
    if options.suite is None:
        parser.error("give --suite cpu or --suite gpu, or --report DIR")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; expected at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # read when torch is imported
    import torch

    from evals.results import Results
    from evals.throughput import compilation, derived, runner, suites

    try:
        chosen = suites.select(suites.cases(options.suite), options.cases)
    except ValueError as error:
        print(f"evals.throughput: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if options.out is None:
        parser.error("--out DIR is missing")
    if options.suite == "gpu" and not torch.cuda.is_available():
        print(
            "evals.throughput: no GPU is visible to torch, so --suite gpu cannot run. Here one can run --suite cpu, "
            "and `seqmodels audit`, which compiles the GPU kernels without a GPU.",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.suite == "gpu" else "cpu")
    deadline = options.deadline or (500.0 if options.suite == "gpu" else 900.0)
    results = Results(options.out, "throughput")
    start = time.monotonic()
    processes = max(0, (os.cpu_count() or 1) - 4) if options.compile is None else options.compile
    if device.type == "cuda" and processes:
        waiting = [case for case in chosen if case.name not in results.finished("latency")]
        compilation.compile_ahead(waiting, device, processes, 0.3 * deadline, say=lambda text: print(text, flush=True))
    deadline -= time.monotonic() - start
    try:
        runner.run(chosen, results, device, deadline=deadline, say=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {results.path}, the same command goes on from there")
        return 130
    finally:
        derived.write(results, say=lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
