"""The page of a results folder: tables and figures made from its rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.recall import figures, real_text
from evals.recall.published import BASED_POINTS, SOURCES, published
from evals.recall.suites import TUNING_SUFFIX
from evals.recall.summary import SUITE, Point, collect, judge, summarise
from evals.results import latest, markdown_table, read

SHOWN_COMMITS = 4
RATIO = "examples_per_second_ratio"
PROCESSOR_RATIO = "examples_per_processor_second_ratio"


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and its figures from the rows of all ``folders``.

    Raises:
        FileNotFoundError: no finished run in them.
    """
    rows = [row for row in read(*folders) if row["suite"] == SUITE]
    runs = collect(rows)
    text = list(real_text.page(rows))
    if not runs and not text:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no finished {SUITE} runs in {where}; run --suite cpu --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    points = summarise(runs.values())
    lines = ["# Recall", "", "What the tasks are, and how to read this page: `docs/recall.md`.", ""]
    for suite in sorted({point.suite for point in points}):
        lines += _suite_page(suite, [point for point in points if point.suite == suite], rows, target)
    lines += text
    lines += _speed(rows)
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _suite_page(suite: str, points: list[Point], rows: Sequence[Mapping[str, Any]], target: Path) -> Iterator[str]:
    runs = [run for point in points for run in point.runs]
    machines, commits = ({run.row[name] for run in runs} for name in ("machine", "commit"))
    hours = sum(run.about["seconds"] for run in runs) / 3600
    versions = runs[0].row["versions"]
    searched = suite.endswith(TUNING_SUFFIX)
    name = suite.removesuffix(TUNING_SUFFIX)
    if searched:
        yield from (
            f"## Learning rates of suite {name}",
            "",
            f"The search for stored learning rates and layers' arguments, with a seed and a test set that suite {name} "
            "does not measure with.",
            "",
        )
    else:
        yield from (f"## Suite {suite}", "")
    yield from (
        f"Measured by `python -m evals.recall --suite {name}{' --rates RATE ...' if searched else ''} --out DIR`, "
        f"page by `--report DIR`: {len(runs)} runs, "
        f"{hours:.2f} hours of single processes, {min(run.row['time'] for run in runs)[:10]} to "
        f"{max(run.row['time'] for run in runs)[:10]}. {'; '.join(sorted(machines))}. "
        f"{_commits(commits)}. " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
    )
    use = [row for row in latest(rows) if row["case"] == f"{suite}/sweep" and row["metric"] == "core_use"]
    for row in use:
        config = row["config"]
        yield (
            f"The last sweep gave a cell to {config['filled']:.0%} of {config['jobs']} cores, and computed on "
            f"{row['value']:.0%} of them, over {config['wall']:.0f} s; the machine's load was {config['load']:.1f}."
        )
        yield ""
    plans: dict[str, list[Point]] = {}
    for point in points:
        plans.setdefault(point.plan, []).append(point)
    whole = {name: some for name, some in plans.items() if "[" not in name}
    if searched:
        for plan, some in whole.items():
            yield from _tried(plan, some)
        return
    figure = f"{suite}.png"
    figures.draw(whole, target / figure, BASED_POINTS if suite == "based" else None)
    yield from (f"![accuracy against state bytes and tokens per second, suite {suite}]({figure})", "")
    yield (
        "State is what all layers together keep for one sequence, as the layers count it; tokens per second are of "
        "training" + (", of one core's processor time." if runs[0].cell["device"] == "cpu" else ", wall time.")
    )
    yield ""
    curves = f"{suite}-curves.png"
    figures.draw_curves(whole, target / curves)
    yield from (f"![accuracy over the steps of training, suite {suite}]({curves})", "")
    for plan, some in whole.items():
        yield from _plan(suite, plan, some)
    if len(whole) < len(plans):
        yield from _variations(suite, plans)
    for text, holds in judge(points):
        yield f"* Control {'holds' if holds else 'FAILS'}: {text}."
    if suite in SOURCES:
        source = SOURCES[suite]
        yield f"* Published numbers: {source.title}{', read off a plot (to about 0.02)' if source.from_plot else ''}."
    yield ""


def _commits(commits: Collection[str]) -> str:
    if len(commits) > SHOWN_COMMITS:
        return f"{len(commits)} commits, which the rows name"
    return f"Commit {', '.join(sorted(commits))}"


def _plan(suite: str, plan: str, points: Sequence[Point]) -> Iterator[str]:
    several = _test_columns(points[0].about["cell"]["task"], list(points[0].chosen[0].test))
    shape = {(point.d_model, point.depth) for point in points}
    known = any(published(suite, plan, point.about["published"], point.d_model) is not None for point in points)
    header = [
        "arm", *(["d_model, depth"] if len(shape) > 1 else []), "parameters", "state bytes", "without convolutions",
        "tokens/s", "accuracy", "seeds", *several, "chosen", "ended", *(["published"] if known else []),
    ]  # fmt: skip
    yield from (f"### {plan}", "")
    yield from markdown_table(header, (_cells(suite, plan, point, len(shape) > 1, several, known) for point in points))
    cell = points[0].about["cell"]
    training = cell["training"]
    limit = (
        f", at most {training['seconds']:g} s of processor time, data and tests included" if training["seconds"] else ""
    )
    yield from (
        "",
        f"Trained on {sum(data['count'] for data in cell['train']):,} examples, at most {training['epochs']} epochs of "
        f"batches of {training['batch_size']}{limit}; `ended` is why a run stopped, and its epochs. Accuracy is the "
        "mean over seeds, +- half the distance from the worst to the best.",
        "",
    )


def _tried(plan: str, points: Sequence[Point]) -> Iterator[str]:
    """A column a rate: the accuracy of each arm at it, with the arguments of its layer."""
    rates = sorted({run.cell["learning_rate"] for point in points for run in point.runs})
    yield from (f"### {plan}", "")
    yield from markdown_table(
        ["arm", "arguments", *(f"{rate:g}" for rate in rates)],
        ([point.arm, _arguments(point), *(_scores(point, rate) for rate in rates)] for point in points),
    )
    yield ""


def _arguments(point: Point) -> str:
    cell = point.about["cell"]
    return ", ".join(f"{name}={value}" for name, value in cell["layers"][cell["layer"]].items())


def _scores(point: Point, rate: float) -> str:
    return " ".join(f"{run.score:.3f}" for run in point.runs if run.cell["learning_rate"] == rate)


def _test_columns(task: str, tests: Sequence[str]) -> dict[str, list[str]]:
    """Columns beside the mean: a test set each; of set disjointness, which list came first."""
    if task != "set_disjointness":
        return {test: [test] for test in tests} if len(tests) > 1 else {}
    columns: dict[str, list[str]] = {"short list first": [], "long list first": []}
    for test in tests:
        sizes = dict(part.split("=") for part in test.split(","))
        columns["short list first" if int(sizes["first"]) < int(sizes["second"]) else "long list first"].append(test)
    return columns


def _cells(
    suite: str, plan: str, point: Point, shaped: bool, tests: Mapping[str, Sequence[str]], known: bool
) -> list[str]:
    number = published(suite, plan, point.about["published"], point.d_model)
    source = SOURCES.get(suite)
    marked = "" if number is None else f"{number:.2f}{' (plot)' if source and source.from_plot else ''}"
    spread = f" +- {point.spread:.3f}" if len(point.chosen) > 1 else ""
    return [
        point.arm,
        *([f"{point.d_model}, {point.depth}"] if shaped else []),
        f"{point.about['parameters']:,}",
        f"{point.state_bytes:,}",
        f"{point.chosen[0].mixer_bytes:,}",
        f"{point.tokens_per_second:,.0f}",
        f"{point.score:.3f}{spread}",
        str(len(point.chosen)),
        *(
            f"{statistics.fmean(run.test[test] for run in point.chosen for test in group):.3f}"
            for group in tests.values()
        ),
        point.about["choice"],
        ", ".join(f"{run.about['ended']} ({run.about['epochs']})" for run in point.chosen),
        *([marked] if known else []),
    ]


def _variations(suite: str, plans: Mapping[str, Sequence[Point]]) -> Iterator[str]:
    """The mean over a task and its variations, an arm a row."""
    tasks = list(dict.fromkeys(name.partition("[")[0] for name in plans))
    arms = sorted({point.arm for points in plans.values() for point in points})
    scores: dict[tuple[str, str], list[float]] = {}
    for name, points in plans.items():
        for point in points:
            scores.setdefault((point.arm, name.partition("[")[0]), []).append(point.score)
    means = {key: statistics.fmean(values) for key, values in scores.items()}
    yield from ("### Means over each task's variations", "")
    yield from markdown_table(
        ["arm", *tasks, "mean"],
        (
            [
                arm,
                *(f"{means[arm, task]:.3f}" if (arm, task) in means else "" for task in tasks),
                f"{statistics.fmean(means[arm, task] for task in tasks if (arm, task) in means):.3f}",
            ]
            for arm in arms
        ),
    )
    yield ""


def _speed(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Training speed of the suite's loop against an eager one."""
    found = [row for row in latest(rows) if row["metric"] in (RATIO, PROCESSOR_RATIO) and row["value"] is not None]
    if not found:
        return
    by_case: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in found:
        by_case.setdefault((row["case"], row["machine"]), {})[row["metric"]] = row
    yield from (
        "## Speed of training",
        "",
        "Measured by `python -m evals.recall --suite speed --out DIR`: examples per second of this suite's loop (a "
        "process of one thread a core) over those of a straightforward eager loop around the same layer in plain "
        "PyTorch (one process, a thread a core), in turns on the same cores, median of the rounds; and the same with "
        "one thread each, over processor time, which other work on the machine does not touch.",
        "",
    )
    yield from markdown_table(
        ["arm", "cores", "ratio on all cores", "ratio by processor time", "load of the machine", "commit"],
        (
            [
                case.rpartition("/")[2],
                next(iter(one.values()))["config"]["cores"],
                *(f"{one[metric]['value']:.2f}" if metric in one else "" for metric in (RATIO, PROCESSOR_RATIO)),
                f"{next(iter(one.values()))['config']['load']:.1f}",
                next(iter(one.values()))["commit"],
            ]
            for (case, _), one in sorted(by_case.items())
        ),
    )
    yield ""
