"""Accuracy against state bytes and against tokens per second, on one figure; and over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.recall.summary import Point

_STYLE: dict[Any, Any] = {
    "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
_MARKERS = "osD^vP*Xh<>p"


def draw(
    plans: Mapping[str, Sequence[Point]],
    path: Path,
    known: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """A row of two panels for each plan of a suite.

    Points are means over seeds, bars reach from the worst seed to the best; widths and depths of one arm are
    joined. ``known`` are published (bytes, accuracy), drawn in grey on the left.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    arms = sorted({point.arm for points in plans.values() for point in points})
    look = {
        arm: {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)]} for index, arm in enumerate(arms)
    }
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(len(plans), 2, figsize=(9.6, 3.1 * len(plans)), sharey=True, squeeze=False)
        for (plan, points), (left, right) in zip(plans.items(), grid, strict=True):
            for arm in arms:
                own = sorted((point for point in points if point.arm == arm), key=lambda point: point.state_bytes)
                if own:
                    _line(left, [point.state_bytes for point in own], own, arm, look[arm])
                    _line(right, [point.tokens_per_second for point in own], own, arm, look[arm])
            for name, line in (known or {}).items():
                left.plot(*zip(*line, strict=True), color="0.6", lw=0.8, ls=":", marker=".", zorder=1)
                left.annotate(name, line[-1], fontsize=6, color="0.4", xytext=(3, -3), textcoords="offset points")
            chance = points[0].about["cell"]["chance"]
            for axes in (left, right):
                axes.set(xscale="log", ylim=(-0.03, 1.05))
                axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
                axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+0", "e")))
                axes.tick_params(axis="x", which="minor", labelsize=6)
                if chance is not None:
                    axes.axhline(chance, color="black", lw=0.8, ls="--")
            left.set(title=plan, ylabel="accuracy", xlabel="state, bytes of one sequence")
            right.set(title=plan, xlabel="training, tokens per second")
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.tight_layout()
        figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def draw_curves(plans: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Test accuracy after each evaluation over the steps of training, a panel for each plan, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = sorted({point.arm for points in plans.values() for point in points})
    color = {arm: f"C{index % 10}" for index, arm in enumerate(arms)}
    style = {arm: ("-", "--", ":")[index // 10 % 3] for index, arm in enumerate(arms)}
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(len(plans), 1, figsize=(7.2, 2.8 * len(plans)), squeeze=False)
        for (plan, points), axes in zip(plans.items(), grid[:, 0], strict=True):
            for point in points:
                for run in point.chosen:
                    history = run.about["history"]
                    steps = [run.about["steps"] * (index + 1) / len(history) for index in range(len(history))]
                    axes.plot(
                        [0, *steps], [point.about["cell"]["chance"] or 0, *history], color=color[point.arm],
                        ls=style[point.arm], lw=1.1, alpha=0.85, label=point.arm,
                    )  # fmt: skip
            axes.set(title=plan, xlabel="steps", ylabel="accuracy", ylim=(-0.03, 1.05))
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.tight_layout()
        figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def _line(axes: Any, x: list[float], own: Sequence[Point], arm: str, look: dict[str, str]) -> None:
    scores = [point.score for point in own]
    low = [point.score - min(run.score for run in point.chosen) for point in own]
    high = [max(run.score for run in point.chosen) - point.score for point in own]
    axes.errorbar(x, scores, yerr=[low, high], ls="-" if len(own) > 1 else "", lw=1, ms=6, capsize=2, alpha=0.85,
                  label=arm, **look)  # fmt: skip
