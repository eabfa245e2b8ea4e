"""The page of a results folder: tables and figures made from its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.results import markdown_table, read
from evals.state_tracking import figures
from evals.state_tracking.published import SOURCES, TASKS, published
from evals.state_tracking.summary import SUITE, ArmSummary, collect, judge, summarise


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and its figures from the rows of all ``folders``.

    Raises:
        FileNotFoundError: no finished run in them.
    """
    runs = collect(read(*folders))
    if not runs:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no finished {SUITE} runs in {where}; run --suite cpu --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    summaries = summarise(runs.values())
    lines = ["# State tracking", ""]
    for suite in sorted({summary.suite for summary in summaries}):
        here = [summary for summary in summaries if summary.suite == suite]
        lines += _suite_page(suite, here, target)
    lines += [
        "## Published, scaled accuracy",
        "",
        *markdown_table(
            ["source", "model", *TASKS],
            (
                (source, name, *(f"{value:.3f}" for value in values))
                for source, table in SOURCES.items()
                for name, values in table.items()
            ),
        ),
        "",
    ]
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _suite_page(suite: str, summaries: list[ArmSummary], target: Path) -> Iterator[str]:
    runs = [run for summary in summaries for run in summary.runs]
    machines, commits = ({run.row[name] for run in runs} for name in ("machine", "commit"))
    versions = runs[0].row["versions"]
    hours = sum(run.row["value"] for run in runs) / 3600
    yield from (
        f"## Suite {suite}",
        "",
        f"Measured by `python -m evals.state_tracking --suite {suite} --out DIR`, page by `--report DIR`: "
        f"{len(runs)} runs, {hours:.2f} hours of single processes. {'; '.join(sorted(machines))}. "
        f"Commit {', '.join(sorted(commits))}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "Scaled accuracy is (accuracy - chance) / (1 - chance): 0 is guessing. Every arm has the same grid and, when "
        "the suite has finished, the same number of runs. The checkpoint of a run and the grid point of an arm are "
        "chosen by validation at the longest trained length, never by the test; 'best run' is the best of all of an "
        "arm's runs by the test itself, which is what the published tables report.",
        "",
    )
    missing = [task for task in TASKS if task not in {summary.task for summary in summaries}]
    for task in dict.fromkeys(summary.task for summary in summaries):
        yield from _task(suite, task, [summary for summary in summaries if summary.task == task], target)
    if missing:
        yield f"Not measured in this suite: {', '.join(missing)}. The suite `paper` has all three, for one GPU."
        yield ""
    for text, holds in judge(summaries):
        yield f"* Control {'holds' if holds else 'FAILS'}: {text}."
    yield ""


def _task(suite: str, task: str, summaries: list[ArmSummary], target: Path) -> Iterator[str]:
    name = f"{task}-{suite}.png"
    figures.draw(summaries, target / name)
    length, cell = max(summaries[0].chosen[0].curve), summaries[0].about["cell"]
    header = [
        "arm", "parameters", "chosen point", f"at {length}: median of seeds", "every seed", "best run (runs)",
        "published (to length 256)", f"validation at {cell['training']['validation_length']}",
    ]  # fmt: skip
    yield from (f"### {task}", "", f"![scaled accuracy over length]({name})", "")
    yield from markdown_table(header, map(_cells, summaries))
    yield from (
        "",
        f"{cell['test_count']} answers at each length. `dt` is the range a layer's time step starts in; layers without "
        f"one had another seed instead. Every run at {length}, by grid point and seed:",
        "",
    )
    yield from markdown_table(["arm", "point", "seeds"], (line for summary in summaries for line in _points(summary)))
    yield ""
    if len({len(summary.runs) for summary in summaries}) > 1:
        counts = ", ".join(f"{summary.arm} {len(summary.runs)}" for summary in summaries)
        yield f"The suite has not finished here; runs by arm so far: {counts}. The same command goes on from there."
        yield ""


def _points(summary: ArmSummary) -> Iterator[list[str]]:
    for point in sorted({run.about["point"] for run in summary.runs}):
        runs = sorted((run for run in summary.runs if run.about["point"] == point), key=lambda run: run.seed)
        yield [summary.arm, point, ", ".join(f"{run.final:.3f}" for run in runs)]


def _cells(summary: ArmSummary) -> list[str]:
    number = published(summary.about["published"], summary.task)
    return [
        summary.arm,
        f"{summary.about['parameters']:,}",
        summary.about["point"],
        f"{summary.median:.3f}",
        ", ".join(f"{run.final:.3f}" for run in summary.chosen),
        f"{summary.best:.3f} ({len(summary.runs)})",
        "" if number is None else f"{number:.3f}",
        ", ".join(f"{run.validation_accuracy:.3f}" for run in summary.chosen),
    ]
