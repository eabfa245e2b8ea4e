"""The page of a results folder: tables and curves made from its rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.lra.published import PUBLISHED, TASKS, TITLES, published
from evals.lra.rows import SUITE, Finished, collect
from evals.results import markdown_table, read


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and a figure a task from the rows of all ``folders``.

    Raises:
        FileNotFoundError: no finished run in them.
    """
    runs = collect(read(*folders))
    if not runs:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no finished {SUITE} runs in {where}; run TASK --config NAME --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    lines = ["# Long Range Arena", "", *_origin(runs)]
    for task in dict.fromkeys(run.task for run in runs):
        lines += _task(task, [run for run in runs if run.task == task], target)
    lines += [
        "## Published, test accuracy in %",
        "",
        *markdown_table(["model", *TITLES], ([name, *(published(name, task) for task in TASKS)] for name in PUBLISHED)),
        "",
    ]
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _origin(runs: Sequence[Finished]) -> Iterator[str]:
    machines, commits = (sorted({run.row[name] for run in runs}) for name in ("machine", "commit"))
    yield (
        "Measured by `python -m evals.lra TASK --config NAME --out DIR` and `python -m evals.lra baselines TASK --out "
        f"DIR`, page by `--report DIR`. {'; '.join(machines)}. Commit {', '.join(commits)}."
    )
    yield ""
    yield (
        "Test accuracy in % at the epoch that validates best (Text has no validation split: its epoch is chosen by "
        "test, as in all published numbers). Without a model: label_prior answers the commonest label, first_token the "
        "commonest label after a sequence's first token (in ListOps the operator at the root), bag_of_tokens is a "
        "logistic regression on the shares of the tokens and the length."
    )
    yield ""


def _task(task: str, runs: list[Finished], target: Path) -> Iterator[str]:
    trained = [run for run in runs if run.seed is not None]
    yield from (f"## {task}", "")
    if trained:
        figure = f"{task}.png"
        _draw(task, runs, target / figure)
        yield from (f"![accuracy over epochs]({figure})", "")
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        parameters = own[0].about.get("parameters")
        rows.append(
            [
                arm + (" (local control)" if own[0].about.get("role") == "local" else ""),
                "" if parameters is None else f"{parameters:,}",
                f"{statistics.mean(run.test for run in own):.2f}",
                ", ".join(f"{run.test:.2f}" for run in own),
                published(own[0].about.get("published"), task),
            ]
        )
    yield from markdown_table(["model", "parameters", "mean of seeds", "every seed", "published"], rows)
    yield ""
    yield from _locality(trained)


def _locality(runs: list[Finished]) -> Iterator[str]:
    """How much of a score a model that sees a short neighbourhood only has too."""
    local = {run.arm for run in runs if run.about.get("role") == "local"}
    if not local or len(local) == len({run.arm for run in runs}):
        return
    scores = {arm: [run.test for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}
    control = max(local, key=lambda arm: statistics.mean(scores[arm]))
    best, mean = max(scores[control]), statistics.mean(scores[control])
    yield (
        f"Locality: the local controls see a short neighbourhood only. The best of them is {control}: what another "
        "model has beyond it is not short-range structure that this control could learn."
    )
    yield ""
    rows = (
        [arm, f"{statistics.mean(found) - mean:+.2f}", f"{min(found) - best:+.2f}"]
        for arm, found in scores.items()
        if arm not in local
    )
    yield from markdown_table(["model", f"mean over that of {control}", f"worst seed over the best of {control}"], rows)
    yield ""


def _draw(task: str, runs: list[Finished], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4), dpi=110)
    colors: dict[str, str] = {}
    for run in runs:
        new = run.arm not in colors
        color = colors.setdefault(run.arm, f"C{len(colors)}")
        label = run.arm if new else None
        if run.seed is None:
            axes.axhline(run.test, color=color, ls="--", lw=1, label=label)
            continue
        history = run.about["history"]
        scores = [100 * row["selection"][0] for row in history]
        axes.plot([row["epoch"] for row in history], scores, color=color, marker="o", ms=3, lw=1, label=label)
    axes.set(title=task, xlabel="epoch", ylabel="accuracy, % (validation; dashed: test)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
