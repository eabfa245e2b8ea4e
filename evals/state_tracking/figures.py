"""Scaled accuracy over length, one figure a task: thick is the median of the seeds, thin are the seeds."""

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
        color = f"C{index}"
        lengths = list(summary.chosen[0].curve)
        for run in summary.chosen:
            axes.plot(lengths, [run.curve[length] for length in lengths], color=color, lw=0.7, alpha=0.5)
        middle = [statistics.median(run.curve[length] for run in summary.chosen) for length in lengths]
        axes.plot(lengths, middle, color=color, lw=2, marker="o", ms=3, label=summary.arm)
    trained = members[0].about["trained_length"]
    axes.axvline(trained, color="black", lw=0.8, ls="--")
    axes.text(trained, 1.06, " trained up to here", fontsize=7, va="bottom", ha="center")
    axes.set_ylim(-0.15, 1.05)
    axes.legend(loc="center right" if members[0].median < 0.5 else "center left")
