"""Long Range Arena: make data, train and test a configuration on a task, or draw the page of what was measured."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

UNFINISHED = 3  # exit status: the time given is over, the same command goes on


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.lra",
        description=__doc__,
        usage="%(prog)s [-h] (TASK --config NAME --out DIR | generate TASK | baselines TASK --out DIR | --report DIR)",
        epilog="tasks: listops, text, retrieval, image, pathfinder32, pathfinder128 (Path-X), pathfinder64, "
        "pathfinder256, and for a CPU listops-256, digits. Data and examples: docs/lra.md. "
        "Exit status: 0, 2 for wrong arguments or data, 3 when --minutes ended first (the same command goes on).",
    )
    parser.add_argument("words", nargs="*", metavar="TASK", help="TASK, 'generate TASK' or 'baselines TASK'")
    parser.add_argument("--config", metavar="NAME|FILE", help="of configs/lra, or a YAML file")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as training.epochs=2")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="of the data; default: $SEQMODELS_LRA_DATA, else ~/.cache/seqmodels/lra",
    )
    parser.add_argument(
        "--source", choices=("auto", "generated", "release"), default="auto",
        help="of ListOps and Pathfinder: what 'generate' made, the files of lra_release.gz, or (auto) what is there",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("s4", "lra"), default="s4",
        help="of Pathfinder: permuted as in S4's and S5's code (the published results), or in the order of the files",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of results.jsonl and runs/; what is there is gone on from"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one run each; default: 0")
    parser.add_argument("--minutes", type=float, help="stop after so long with a checkpoint, and exit with status 3")
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes of generate; default: all cores"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="draw README.md and figures into the first, from the rows of all",
    )
    options = parser.parse_args(arguments)
    try:
        if options.report:
            from evals.lra.report import write_report

            print(f"wrote {write_report(options.report[0], options.report)}")
            return 0
        command, task = (options.words[0], options.words[1:]) if len(options.words) == 2 else ("train", options.words)
        if len(task) != 1 or command not in ("train", "generate", "baselines"):
            parser.error("give TASK, 'generate TASK', 'baselines TASK' or --report DIR")
        if options.minutes is not None and options.minutes <= 0:
            parser.error(f"--minutes is {options.minutes}; expected a positive number")
        if options.jobs < 1:
            parser.error(f"--jobs is {options.jobs}; expected at least 1")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends: as if Ctrl-C were pressed
        return {"train": _train, "generate": _generate, "baselines": _baselines}[command](task[0], options, parser)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, ModuleNotFoundError, FloatingPointError, RuntimeError) as error:
        print(f"evals.lra: {error}", file=sys.stderr)
        return 2


def _generate(task: str, options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from seqmodels.tasks.lra import generate_task
    from seqmodels.tasks.lra.registry import generated_plan

    generated_plan(task)  # a task that is not generated is refused before a bar is drawn
    columns = (TextColumn(task), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(task, total=None)

        def done(finished: int, shards: int) -> None:
            progress.update(bar, completed=finished, total=shards)

        folder, digest = generate_task(task, options.data, jobs=options.jobs, done=done)
    print(f"{folder}: digest {digest}")
    if task.startswith("pathfinder"):
        from evals.lra.contact_sheet import contact_sheet

        print(f"wrote {contact_sheet(folder, folder / 'contact_sheet.png')}")
    return 0


def _baselines(task: str, options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from evals.lra.baselines import baselines
    from evals.lra.rows import SUITE, write_baselines
    from evals.results import Results
    from seqmodels.tasks.lra import DataOptions, load_task

    if options.out is None:
        parser.error("--out DIR is missing")
    data = load_task(task, options.data, DataOptions(options.source, options.split))
    found = baselines(data)
    write_baselines(Results(options.out, SUITE), task, found, data.digest)
    for name, value in found.items():
        print(f"{task} {name}: {100 * value:.2f} %")
    return 0


def _train(task: str, options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import time

    import torch

    from evals.lra.plans import load_run, plan_names
    from evals.lra.rows import SUITE, collect, write_run
    from evals.lra.training import Trainer
    from evals.results import Results, read
    from seqmodels.tasks.lra import DataOptions, load_task, task_named

    task_named(task)
    if options.config is None:
        parser.error(f"--config is missing; there are {', '.join(plan_names())}, or give a YAML file")
    if options.out is None:
        parser.error("--out DIR is missing")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    runs = [load_run(options.config, task, seed, options.set) for seed in options.seeds]
    data = load_task(task, options.data, DataOptions(options.source, options.split))
    results = Results(options.out, SUITE)
    ends = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    for run in runs:
        kept = {(finished.about["digest"], finished.about["data"]): finished
                for finished in collect(read(results.path)) if finished.seed is not None}  # fmt: skip
        if (run.digest, data.digest) in kept:
            finished = kept[run.digest, data.digest]
            print(f"{task}/{run.arm} seed {run.seed}: {finished.test:.2f} %, kept from commit {finished.row['commit']}")
            continue
        folder = options.out / "runs" / f"{task}-{run.arm}-{run.seed}-{run.digest}"
        trainer = Trainer(run, data, folder, device, _printer(f"{task}/{run.arm} seed {run.seed}"))
        outcome = trainer.fit(ends - time.monotonic())
        if outcome is None:
            print(f"stopped at step {trainer.step} of {trainer.steps}; the same command goes on from {folder}")
            return UNFINISHED
        row = write_run(results, run, outcome, data.digest)
        print(f"{task}/{run.arm} seed {run.seed}: test {row['value']:.2f} % (epoch {outcome.epoch})")
    return 0


def _printer(name: str) -> Any:
    def say(message: dict[str, Any]) -> None:
        scores = [f"{part} {100 * message[part][0]:.2f} %" for part in ("selection", "test") if part in message]
        text = ", ".join([f"loss {message['loss']:.4f}", *scores])
        print(f"{name}: epoch {message['epoch']}, step {message['step']} of {message['steps']}: {text}", flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
