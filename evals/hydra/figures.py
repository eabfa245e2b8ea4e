"""The figures of the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.hydra.summary import Run

_STYLE: dict[Any, Any] = {
    "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
METRICS = ("forward_tokens_per_second", "decode_tokens_per_second", "state_bytes")


def throughput_table(found: dict[str, list[Run]]) -> dict[str, dict[str, dict[int, float]]]:
    """Metric to model to length to value."""
    table: dict[str, dict[str, dict[int, float]]] = {metric: {} for metric in METRICS}
    for runs in found.values():
        for metric in METRICS:
            for model, row in runs[-1].named(metric).items():
                table[metric].setdefault(model, {})[row["config"]["length"]] = row["value"]
    return table


def draw_throughput(table: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    with _figure(path, 2) as panels:
        for axes, metric, title in zip(panels, METRICS, ("whole sequences", "decoding"), strict=False):
            for model, values in table[metric].items():
                lengths = sorted(values)
                axes.plot(lengths, [values[n] for n in lengths], marker="o", ms=3, label=model)
            axes.set(title=title, xlabel="length", ylabel="tokens a processor second", xscale="log", yscale="log")
            axes.set_xticks(lengths, [str(n) for n in lengths])
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panels[0].legend()


def draw_routing(found: dict[str, list[Run]], path: Path) -> None:
    """Means over seeds, with the least and the greatest."""
    with _figure(path, 2) as panels:
        for axes, metric, title in zip(
            panels, ("assignment_entropy", "usage_std"), ("assignment entropy, nats", "std of usage"), strict=True
        ):
            for index, weight in enumerate(sorted({_options(runs)["balance_weight"] for runs in found.values()})):
                points = sorted(
                    (_options(runs)["temperature"], sorted(over_layers(run, metric) for run in runs))
                    for runs in found.values()
                    if _options(runs)["balance_weight"] == weight
                )
                means = [statistics.mean(values) for _, values in points]
                errors = [
                    [mean - values[0] for mean, (_, values) in zip(means, points, strict=True)],
                    [values[-1] - mean for mean, (_, values) in zip(means, points, strict=True)],
                ]
                places = [temperature * 1.03**index for temperature, _ in points]  # beside each other
                axes.errorbar(
                    places, means, errors, marker="o", ms=3, capsize=2, lw=1, label=f"balance weight {weight:g}"
                )
            axes.set(title=title, xlabel="temperature", xscale="log")
            axes.set_xticks([temperature for temperature, _ in points], [f"{t:g}" for t, _ in points])
            axes.minorticks_off()
        panels[0].axhline(math.log(4), color="black", ls="--", lw=0.8, label="even use")
        panels[0].legend()


def over_layers(run: Run, metric: str) -> float:
    return statistics.mean(row["value"] for row in run.named(metric).values())


def draw_memory(found: dict[str, list[Run]], path: Path) -> None:
    with _figure(path, 1, 7.5) as panels:
        for index, (_, runs) in enumerate(found.items()):
            values = [run.value("accuracy") for run in runs]
            panels[0].bar(index, statistics.mean(values), color=f"C{index}", alpha=0.6)
            panels[0].plot([index] * len(values), values, "k.")
        panels[0].axhline(_chance(found), color="black", ls="--", lw=0.8, label="chance")
        panels[0].set_xticks(range(len(found)), [arm.replace("/", "\n").replace(", ", ",\n") for arm in found])
        panels[0].set(ylabel="accuracy; a dot a seed", ylim=(0, 1.05))
        panels[0].legend()


def draw_facts(found: dict[str, list[Run]], path: Path) -> None:
    with _figure(path, 2) as panels:
        bars: dict[str, list[float]] = {}
        for arm, runs in found.items():
            bars[arm] = [run.value("accuracy") for run in runs]
            ablated = [run.value("accuracy_ablated") for run in runs if ("accuracy_ablated", None) in run.rows]
            if ablated:
                bars[f"{arm},\nswitched off"] = ablated
            for run in runs:
                gate = sorted((row["config"]["step"], row["value"]) for row in run.named("gate").values())
                if gate:
                    panels[1].plot(*zip(*gate, strict=True), marker="o", ms=3, label=f"seed {run.seed}")
        for index, values in enumerate(bars.values()):
            panels[0].bar(index, statistics.mean(values), color=f"C{index}", alpha=0.6)
            panels[0].plot([index] * len(values), values, "k.")
        panels[0].axhline(_chance(found), color="black", ls="--", lw=0.8, label="chance")
        panels[0].set_xticks(range(len(bars)), list(bars))
        panels[0].set(ylabel="accuracy; a dot a seed", ylim=(0, 1.05))
        panels[0].legend()
        if panels[1].lines:  # too short a run has no gates
            panels[1].legend()
        panels[1].set(title="mean gate of the memory", xlabel="step")


def _chance(found: dict[str, list[Run]]) -> float:
    return next(iter(found.values()))[0].rows["accuracy", None]["config"]["chance"]


def _options(runs: list[Run]) -> dict[str, Any]:
    return runs[0].last["config"]["cell"]["options"]


@contextmanager
def _figure(path: Path, panels: int, width: float = 4.6) -> Iterator[list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(width * panels, 3.3), squeeze=False)
        yield list(axes[0])
        figure.tight_layout()
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)
