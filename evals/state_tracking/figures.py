"""Scaled accuracy over length, one figure a task: marked lines are medians of the seeds, thin ones are the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.state_tracking.summary import ArmSummary

_STYLE = {
    "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


def draw(summaries: Sequence[ArmSummary], path: Path) -> None:
    """The arms of one suite and task: Mamba-3 beside its ablations, and beside the other layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    family = [summary for summary in summaries if summary.chosen[0].layer == "mamba3"]
    others = [summary for summary in summaries if summary.chosen[0].layer != "mamba3"]
    plain = [summary for summary in family if summary.arm == "mamba3"]
    panels = [("Mamba-3 and its ablations", family), ("Mamba-3 and other layers", plain + others)]
    panels = [(title, members) for title, members in panels if members]
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), sharey=True, squeeze=False)
        for axes, (title, members) in zip(grid[0], panels, strict=True):
            _panel(axes, members)
            axes.set(title=title, xlabel="length")
        grid[0][0].set_ylabel("scaled accuracy")
        figure.tight_layout()
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def _panel(axes: Any, members: Sequence[ArmSummary]) -> None:
    for index, summary in enumerate(members):
        # The first line is thin and on top, so that one that lies under it still shows.
        style = {"color": f"C{index}", "zorder": 3 - 0.1 * index}
        lengths = list(summary.chosen[0].curve)
        for run in summary.chosen:
            axes.plot(lengths, [run.curve[length] for length in lengths], lw=0.7, alpha=0.5, **style)
        middle = [statistics.median(run.curve[length] for run in summary.chosen) for length in lengths]
        width = 1.6 if index == 0 else 4
        axes.plot(lengths, middle, lw=width, alpha=0.8, marker="o", ms=width + 1, label=summary.arm, **style)
    trained = members[0].about["trained_length"]
    axes.axvline(trained, color="black", lw=0.8, ls="--")
    axes.text(trained, 0.3, "longest trained ", fontsize=7, ha="right", rotation=90, va="center")
    axes.set_ylim(-0.15, 1.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
