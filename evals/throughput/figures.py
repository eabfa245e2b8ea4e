"""Figures of the throughput page. Solid lines are this library, dashed ones are others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.throughput.derived import series_of

Rows = list[dict[str, Any]]
_STYLE = {
    "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


def draw(rows: Rows, folder: Path, slug: str) -> Iterator[tuple[str, str]]:
    """Writes what the rows allow; yields (title, file name)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        for title, stem, function in (
            ("Cost over length", "cost-over-length", _cost_over_length),
            ("Decode latency over batch", "decode-over-batch", _decode_over_batch),
            ("Throughput, beside others", "beside-others", _beside_others),
            ("Share of the machine's limit", "share-of-limit", _share_of_limit),
        ):
            figure = function(rows, plt)
            if figure is None:
                continue
            name = f"{stem}-{slug}.png"
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
            yield title, name


def _label(row: dict[str, Any]) -> str:
    return row["rival"] or f"seqmodels {row['backend']}"


def _cost_over_length(rows: Rows, plt: Any) -> Any:
    """Microseconds a token over length: flat is linear. Series of three lengths or more, where there are any."""
    lines = {
        key: points
        for key, points in series_of(rows).items()
        if len(points) > 1 and points[0][1]["config"]["mode"] != "decode" and _is_best(key, rows)
    }
    if not lines:
        return None
    most = max(len(points) for points in lines.values())
    lines = {key: points for key, points in lines.items() if len(points) >= min(3, most)}
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for (_, backend, rival, _), points in sorted(lines.items(), key=str):
        config = points[0][1]["config"]
        tokens = [length * config["batch"] for length, _ in points]
        cost = [1e3 * row["value"] / count for (_, row), count in zip(points, tokens, strict=True)]
        width = f", width {config['d_model']}" if "d_model" in config else ""
        name = f"{config['layer']} {config['kind']} {config['mode']}{width}: {rival or backend}"
        axes.plot([length for length, _ in points], cost, marker="o", ls="--" if rival else "-", label=name)
    _log_lengths(axes, sorted({length for points in lines.values() for length, _ in points}))
    costs = [value for line in axes.lines for value in line.get_ydata()]
    if max(costs) > 8 * min(costs):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(costs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="length (tokens)", ylabel="microseconds a token", title="Cost over length (flat is linear)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _is_best(key: tuple[Any, ...], rows: Rows) -> bool:
    """Of this library's backends, the first that was measured stands for the series."""
    series, backend, rival, _ = key
    own = (row for row in rows if row["metric"] == "latency" and row["rival"] is None)
    first = next((row["backend"] for row in own if row["config"]["series"] == series), None)
    return rival is not None or backend == first


def _decode_over_batch(rows: Rows, plt: Any) -> Any:
    decode = [row for row in rows if row["metric"] == "latency" and row["config"]["mode"] == "decode"]
    found: dict[tuple[Any, ...], list[tuple[int, float]]] = defaultdict(list)
    for row in decode:
        config = row["config"]
        if _is_best((config["series"], row["backend"], row["rival"], None), rows):
            key = (config["kind"], config["layer"], config["length"], row["rival"])
            found[key].append((config["batch"], row["value"]))
    found = {key: sorted(points) for key, points in found.items() if len(points) > 1}
    if not found:
        return None
    panels = sorted({key[:2] for key in found})
    figure, grid = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), sharey=True, squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        for (kind, layer, _, rival), points in sorted(found.items(), key=str):
            if (kind, layer) == panel:
                style = {"ls": "--"} if rival else {"lw": 2.2, "color": "black"}
                axes.plot(*zip(*points, strict=True), marker="o", label=rival or "seqmodels", **style)
        batches = sorted({batch for key, points in found.items() if key[:2] == panel for batch, _ in points})
        axes.set(xscale="log", yscale="log", xlabel="batch", title=f"{panel[1]} {panel[0]}")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.minorticks_off()
        axes.legend()
    grid[0][0].set_ylabel("milliseconds a step")
    return figure


def _beside_others(rows: Rows, plt: Any) -> Any:
    """Ratio bars: how many times longer others take."""
    ratios = [row for row in rows if row["metric"] == "ratio" and not str(row["rival"]).startswith("seqmodels")]
    if not ratios:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 0.8 + 0.24 * len(ratios)))
    ratios.sort(key=lambda row: (row["case"], row["value"]), reverse=True)
    names = [f"{row['case'].partition(':')[2]}   vs {row['rival']}" for row in ratios]
    values = [row["value"] for row in ratios]
    colors = ["#2a7f62" if value >= 1 else "#b5483a" for value in values]
    axes.barh(range(len(values)), values, color=colors, height=0.7)
    for index, value in enumerate(values):
        axes.text(value * 1.03, index, f"{value:.2f}", va="center", fontsize=7)
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel="time of the other / time of seqmodels (right of 1: seqmodels is faster)")
    axes.set_xlim(min(0.5, 0.8 * min(values)), 1.6 * max(values))
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.grid(axis="y", visible=False)
    return figure


def _share_of_limit(rows: Rows, plt: Any) -> Any:
    shares = [
        row
        for row in rows
        if row["metric"] == "share_of_limit" and row["rival"] is None
        and _is_best((row["config"]["series"], row["backend"], None, None), rows)
    ]  # fmt: skip
    if not shares:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 0.8 + 0.24 * len(shares)))
    shares.sort(key=lambda row: row["value"])
    colors = ["#4c72b0" if row["config"]["binds"] == "memory" else "#dd8452" for row in shares]
    axes.barh(range(len(shares)), [row["value"] for row in shares], color=colors, height=0.7)
    names = [f"{row['case'].partition(':')[2]} ({row['backend']})" for row in shares]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(-0.6, len(shares) - 0.4)
    axes.set_xlim(0, max(1.0, 1.05 * shares[-1]["value"]))
    axes.axvline(1, color="black", lw=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of the limit: floor over time (blue: memory binds; orange: compute)")
    axes.grid(axis="y", visible=False)
    return figure


def _log_lengths(axes: Any, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths])
    axes.minorticks_off()
