"""Rows made from rows: how cost grows with length, and whether a decode step depends on its position."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from evals.results import Results, latest, read

BAR = (0.9, 1.1)  # slope of a layer whose cost is linear in length
SHORTEST = 2048


def fit_slope(points: Iterable[tuple[float, float]]) -> float:
    """Least-squares slope of log cost over log length."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def series_of(rows: Iterable[dict[str, Any]], metric: str = "latency") -> dict[tuple[Any, ...], list[tuple[int, dict]]]:
    """(series, backend, rival, machine) -> (length, row) in order of length."""
    found = defaultdict(list)
    for row in rows:
        if row["metric"] == metric and row["value"] is not None and "series" in row["config"]:
            key = (row["config"]["series"], row["backend"], row["rival"], row["machine"])
            found[key].append((row["config"]["length"], row))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def write(results: Results, say: Callable[[str], None] = print) -> None:
    """Appends ``slope`` rows (2k tokens up, log cost over log length) and ``position_ratio`` rows (decode)."""
    rows = latest(row for row in read(results.path) if row["suite"] == results.suite)
    here = results.stamp["machine"]
    names = ("kind", "layer", "mode", "dtype", "batch", "threads")
    for (series, backend, rival, machine), points in sorted(series_of(rows).items(), key=str):
        if machine != here:
            continue
        first = points[0][1]
        config = {name: first["config"].get(name) for name in names}
        config |= {"series": series, "lengths": [length for length, _ in points]}
        facts: dict[str, Any] = {"layer": first["layer"], "backend": backend, "rival": rival}
        if config["mode"] == "decode":
            if len(points) > 1:
                values = [row["value"] for _, row in points]
                results.write(series, "position_ratio", max(values) / min(values), "x", config=config, **facts)
            continue
        long = [(length, row["value"]) for length, row in points if length >= SHORTEST]
        if len(long) > 1:
            slope = fit_slope(long)
            results.write(series, "slope", slope, "", config={**config, "bar": BAR}, **facts)
            if rival is None:
                verdict = f"{'within' if BAR[0] <= slope <= BAR[1] else 'outside'} {BAR[0]} to {BAR[1]}"
                say(f"{series} on {backend}: cost grows as length to the power {slope:.2f}, {verdict}")
