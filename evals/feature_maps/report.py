"""The page of a results folder: a table and a picture, from the rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evals.feature_maps.cells import MAPS, SOFTMAX, SUITE
from evals.feature_maps.controls import UNIFORM, judge
from evals.results import latest, markdown_table, read

Rows = list[dict[str, Any]]
# Where labels stand that would cover others: points to the right of and above their mark.
_LABELS = {
    "hedgehog_exp": (1, 16), "hedgehog_joint": (8, 5), "hedgehog_split": (8, -4), "hedgehog_joint_doubled": (6, -12),
    "relu": (-8, 0), "elu": (-6, -11),
}  # fmt: skip
_COLOURS = {"untrained": "tab:orange", "distilled": "tab:blue"}


def load(folders: Sequence[Path]) -> Rows:
    """This suite's rows, the last of each key.

    Raises:
        FileNotFoundError: no row of this suite in them.
    """
    rows = latest(row for row in read(*folders) if row["suite"] == SUITE and row["value"] is not None)
    if not rows:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no {SUITE} rows in {where}; run python -m evals.{SUITE} --out DIR first")
    return rows


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and its figure."""
    rows = load(folders)
    target.mkdir(parents=True, exist_ok=True)
    _draw(rows, target / "maps.png")
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# Spikiness and monotonicity of feature maps", "",
        f"Made by `python -m evals.{SUITE} --out DIR` on {', '.join(sorted({row['machine'] for row in rows}))}, commit "
        f"{', '.join(sorted({row['commit'] for row in rows}))}; page by `--report DIR`. Mean over {seeds} seeds, "
        "± their standard deviation.", "",
        "Tokens: 64 random tokens a row out of 64, whose equals find each other; causal, 4 heads of width 32. "
        "Distilled: the maps of q and k, from the identity, on the softmax's weights, 300 steps of AdamW at 1e-2; "
        f"measured on rows that were not trained on. Equal weights have an entropy of {UNIFORM:.2f} nats. Monotonicity "
        "is Spearman's correlation of q · k and the weight, over rows of 8 tokens and more. The identity map is "
        "missing: its weights have either sign. A weight below 1e-12 counts as 1e-12 in a logarithm, which is what "
        "T2R's weights of zero cost it in KL.", "",
        "![Entropy against monotonicity, and divergence](maps.png)", "",
        *markdown_table(
            ["map", "stage", "entropy", "monotonicity", "KL from the softmax", "entropy on noise (ln n = 4.85)"],
            _table(rows),
        ),
        "", "Controls, each for every seed:", "",
        *(f"- {'holds' if holds else 'FAILS'}: {text}" for text, holds in judge(rows)), "",
    ]  # fmt: skip
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _values(rows: Rows, inputs: str, name: str, stage: str, metric: str) -> list[float]:
    wanted = {"inputs": inputs, "map": name, "stage": stage}
    return [
        row["value"]
        for row in rows
        if row["metric"] == metric and all(row["config"][key] == value for key, value in wanted.items())
    ]


def _table(rows: Rows) -> list[list[str]]:
    lines = []
    for name in (SOFTMAX, *MAPS):
        for stage in _COLOURS:
            metrics = ("entropy", "monotonicity", "divergence")
            values = [_values(rows, "tokens", name, stage, metric) for metric in metrics]
            if values[0]:
                noise = _values(rows, "noise", name, stage, "entropy")
                lines.append([name, stage, *map(_spread, values), _spread(noise)])
    return lines


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _draw(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
             "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}  # fmt: skip
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.6, 4.4), width_ratios=(1.5, 1), layout="constrained")
        _scatter(rows, left)
        _bars(rows, right)
        figure.savefig(path)
        plt.close(figure)


def _point(rows: Rows, name: str, stage: str) -> tuple[float, float]:
    pair = [_values(rows, "tokens", name, stage, metric) for metric in ("entropy", "monotonicity")]
    return (mean(pair[0]), mean(pair[1])) if all(pair) else (math.nan, math.nan)


def _scatter(rows: Rows, axes: Any) -> None:
    for name in (SOFTMAX, *MAPS):
        points = {stage: _point(rows, name, stage) for stage in _COLOURS}
        trained = not math.isnan(points["distilled"][0])
        if trained:
            axes.annotate("", points["distilled"], points["untrained"],
                          arrowprops={"arrowstyle": "->", "color": "grey", "alpha": 0.6})  # fmt: skip
        for stage, (x, y) in points.items():
            axes.plot(x, y, marker="*" if name == SOFTMAX else "o", ms=13 if name == SOFTMAX else 6,
                      color="black" if name == SOFTMAX else _COLOURS[stage])  # fmt: skip
        x, y = points["distilled" if trained else "untrained"]
        right, up = _LABELS.get(name, (6, 5))
        axes.annotate(name, (x, y), xytext=(right, up), textcoords="offset points", fontsize=8,
                      ha="left" if right > 0 else "right")  # fmt: skip
    axes.axvline(UNIFORM, color="black", lw=0.8, ls="--")
    axes.text(UNIFORM, 0.02, "equal weights ", ha="right", fontsize=8, transform=axes.get_xaxis_transform())
    for stage, colour in _COLOURS.items():
        axes.plot([], [], "o", color=colour, label=stage)
    axes.legend(loc="upper right")
    axes.set(xlabel="entropy of the weights (nats; left is spikier)", ylabel="Spearman(q · k, weight)",
             title="spiky and monotone: up and to the left", xlim=(0, UNIFORM + 0.15))  # fmt: skip


def _bars(rows: Rows, axes: Any) -> None:
    final = {}
    for name in MAPS:
        for stage in _COLOURS:
            values = _values(rows, "tokens", name, stage, "divergence")
            if values:
                final[name] = (mean(values), stage)
    names = sorted(final, key=lambda name: -final[name][0])
    axes.barh(names, [final[name][0] for name in names], color=[_COLOURS[final[name][1]] for name in names])
    axes.set(xlabel="KL(softmax || map), nats", title="distance from the softmax")
    axes.grid(axis="y", visible=False)
