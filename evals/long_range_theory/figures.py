"""Figures of the page, from rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
_STYLE = {
    "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
_LOOK = {
    "s4d": ("S4D-LegS", "tab:red", "-", 1.2),
    "s4_ptd": ("PTD", "tab:blue", "-", 1.6),
    "legs": ("LegS, exact", "black", "--", 1.2),
}


def draw(rows: Rows, folder: Path) -> dict[str, str]:
    """Writes a figure for each topic that has its rows; topic to file name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = {}
    with plt.rc_context(_STYLE):
        for topic, function in (
            ("transfer", _transfer),
            ("convergence", _convergence),
            ("conditioning", _conditioning),
            ("noise", _noise),
        ):
            here = [row for row in rows if row["config"]["topic"] == topic]
            if not here:
                continue
            figure = function(here, plt)
            made[topic] = f"{topic}.png"
            figure.savefig(folder / made[topic], bbox_inches="tight")
            plt.close(figure)
    return made


def _transfer(rows: Rows, plt: Any) -> Any:
    curves = [row for row in rows if "curve" in row["config"]]
    sizes = sorted({row["config"]["N"] for row in curves})
    figure, panels = plt.subplots(1, len(sizes), figsize=(4.6 * len(sizes), 3.4), sharey=True, squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        for row in sorted((row for row in curves if row["config"]["N"] == size), key=_order):
            _plot_curve(axes, row)
        axes.axhline(0.63662, color="tab:red", lw=0.8, ls=":")
        axes.text(0.11, 0.68, "2/π", color="tab:red", fontsize=8)
        axes.set(xscale="log", yscale="log", title=f"N = {size}", xlabel="ω (radians a unit of time)")
    panels[0][0].set_ylabel("|G(iω)|, first coefficient")
    panels[0][0].legend(loc="lower left")
    return figure


def _noise(rows: Rows, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for row in sorted((row for row in rows if "curve" in row["config"]), key=_order):
        _plot_curve(axes, row)
    axes.set(xscale="log", yscale="log", xlabel="ω (radians a unit of time)", ylabel="RMS |G(iω)| over random C",
             title="N = 32")  # fmt: skip
    axes.legend(loc="lower left")
    return figure


def _convergence(rows: Rows, plt: Any) -> Any:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        series.setdefault(row["config"]["what"], []).append((row["config"]["N"], row["value"]))
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for what, points in series.items():
        sizes, errors = zip(*sorted(points), strict=True)
        strong = "all" in what or "impulse" in what
        axes.plot(sizes, errors, marker="o", ls="-" if strong else "--", label=what)
    sizes = sorted({size for points in series.values() for size, _ in points})
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="error of S4D-LegS against LegS",
             title="solid: does not converge; dashed: converges")  # fmt: skip
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _conditioning(rows: Rows, plt: Any) -> Any:
    points = {row["case"]: row["config"] for row in rows if "kind" in row["config"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.4))
    for kind, label, color in (("ptd", "PTD", "tab:blue"), ("random", "random", "tab:orange")):
        chosen = sorted((c for c in points.values() if c["kind"] == kind), key=lambda c: c["relative_size"])
        sizes = [c["relative_size"] for c in chosen]
        left.plot(sizes, [c["kappa"] for c in chosen], marker="o", color=color, label=label)
        right.plot(sizes, [c["error"] for c in chosen], marker="o", color=color, label=label)
        unstable = [c for c in chosen if c.get("unstable")]
        label = "random, some unstable" if unstable else None
        for axes, name in ((left, "kappa"), (right, "error")):
            axes.plot([c["relative_size"] for c in unstable], [c[name] for c in unstable], "x", color="black", ms=9,
                      label=label)  # fmt: skip
    left.set(ylabel="κ(V)")
    right.set(ylabel="sup |G - G_LegS|")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="‖E‖ / ‖A‖ (PTD Frobenius, random spectral)")
    left.legend(loc="lower left")
    return figure


def _plot_curve(axes: Any, row: dict[str, Any]) -> None:
    label, color, style, width = _LOOK[_layer(row)]
    curve = row["config"]["curve"]
    axes.plot(curve["x"], curve["y"], color=color, ls=style, lw=width, label=label)


def _layer(row: dict[str, Any]) -> str:
    return row["case"].partition("/")[2].split()[0]


def _order(row: dict[str, Any]) -> int:
    return list(_LOOK).index(_layer(row))
