"""The page of a results folder: a table and a figure a suite, made from its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.results import markdown_table, read
from evals.set_disjointness.summary import ORDERS, SUITE, Point, collect, judge, points

ARMS = {"causal": "C0", "prefix": "C1", "attention": "C2"}
_STYLE = {
    "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and its figures from the rows of all ``folders``.

    Raises:
        FileNotFoundError: no finished run in them.
    """
    found = points(collect(read(*folders)).values())
    if not found:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no finished {SUITE} runs in {where}; run --suite cpu --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    lines = ["# Set disjointness", ""]
    for suite in sorted({point.suite for point in found}):
        lines += _page(suite, [point for point in found if point.suite == suite], target)
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def draw(found: Sequence[Point], path: Path) -> None:
    """Accuracy against the numbers in the mixers' states, one panel an order; small marks are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.3), sharey=True)
        for axes, order in zip(panels, ORDERS, strict=True):
            for arm, color in ARMS.items():
                members = [point for point in found if point.arm == arm]
                style = {"color": color, "marker": "o", "ms": 5, "lw": 1.6, "label": arm}
                axes.plot([p.state_elements for p in members], [p.mean(order) for p in members], **style)
                for point in members:
                    values = [run.order(order) for run in point.runs]
                    axes.plot([point.state_elements] * len(values), values, "x", color=color, ms=4, alpha=0.7)
            axes.set_xscale("log", base=2)
            axes.set(title=order, xlabel="numbers in the mixers' states", ylim=(0, 1.05))
        panels[0].set_ylabel("accuracy")
        panels[1].legend(loc="lower right")
        figure.tight_layout()
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def _page(suite: str, found: list[Point], target: Path) -> Iterator[str]:
    runs = [run for point in found for run in point.runs]
    machines, commits = (sorted({run.row[name] for run in runs}) for name in ("machine", "commit"))
    cell = runs[0].about["cell"]
    plan = cell["plan"]
    by_arm = {run.about["arm"]: f"{run.about['cell']['plan']['steps']:,} steps ({run.about['arm']})" for run in runs}
    steps = ", ".join(by_arm.values())
    draw(found, target / f"{suite}.png")
    mlp = " mlp" if cell["mlp_expansion"] else ""
    yield from (
        f"## Suite {suite}",
        "",
        f"Measured by `python -m evals.set_disjointness --suite {suite} --out DIR`, page by `--report DIR`: "
        f"{len(runs)} runs, {sum(run.row['value'] for run in runs) / 60:.0f} minutes of single processes. "
        f"{'; '.join(machines)}. Commit {', '.join(commits)}. "
        + ", ".join(f"{name} {version}" for name, version in runs[0].row["versions"].items())
        + ".",
        "",
        "Two lists that share one element; the model reads A, then B, and names it. "
        f"{cell['pairs']} x (gated_conv{mlp} mixer{mlp}), no positions, vocabulary {plan['vocab_size']}, trained on "
        f"(|A|, |B|) = {', '.join(f'({a}, {b})' for a, b in plan['train_sizes'])} for {steps} of "
        f"{plan['batch_size']}; {plan['test_count']:,} test examples a size. `causal` is Taylor linear attention, "
        "`prefix` the same with a second reading of the whole input (prefix linear attention), both with the same "
        "state; `attention` keeps every token. Means over seeds at the best learning rate.",
        "",
        f"![accuracy over state size]({suite}.png)",
        "",
    )
    sizes = list(runs[0].accuracy)
    header = [
        "mixer",
        "d",
        "f",
        "state",
        "parameters",
        *(o.replace("|", "\\|") for o in ORDERS),
        "order costs, every seed",
    ]
    header += [f"{a}, {b}" for a, b in sizes]
    yield from markdown_table(header, (_cells(point, sizes) for point in found))
    yield ""
    for text, holds in judge(found):
        yield f"* Control {'holds' if holds else 'FAILS'}: {text}."
    yield ""


def _cells(point: Point, sizes: Sequence[tuple[int, int]]) -> list[str]:
    return [
        point.arm,
        str(point.d_model),
        str(point.feature_dim or ""),
        f"{point.state_elements:,}",
        f"{point.runs[0].about['parameters']:,}",
        *(f"{point.mean(order):.3f}" for order in ORDERS),
        ", ".join(f"{run.gap:.3f}" for run in point.runs),
        *(f"{sum(run.accuracy[size] for run in point.runs) / len(point.runs):.3f}" for size in sizes),
    ]
