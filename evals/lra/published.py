"""Published test accuracies (%), by model and task; None: not better than chance ("fail"), NaN: not reported."""

from __future__ import annotations

TASKS = ("listops", "text", "retrieval", "image", "pathfinder32", "pathfinder128")
TITLES = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder", "Path-X")

NAN = float("nan")
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "Transformer": (36.37, 64.27, 57.46, 42.44, 71.40, None),
    "Hedgehog": (37.15, 64.60, 82.24, 40.15, 74.16, NAN),
    "S4-LegS": (59.60, 86.82, 90.90, 88.65, 94.20, 96.35),
    "S4D-LegS": (60.47, 86.18, 89.46, 88.19, 93.06, 91.95),
    "S4D-Inv": (60.18, 87.34, 91.09, 87.83, 93.78, 92.80),
    "S4D-Lin": (60.52, 86.97, 90.96, 87.93, 93.96, None),
    "S4-PTD": (60.65, 88.32, 91.07, 88.27, 94.79, 96.39),
    "LRU": (60.2, 89.4, 89.9, 89.0, 95.1, 94.2),
    "S5": (62.15, 89.31, 91.40, 88.00, 95.33, 98.58),
    "S5-PTD": (62.75, 89.41, 91.51, 87.92, 95.54, 98.52),
    "Mega": (63.14, 90.43, 91.25, 90.44, 96.01, 97.98),
    "Mamba (S6), as in B2S6": (38.02, 82.98, 72.14, 69.82, 69.26, 67.32),
    "B2S6": (63.85, 88.32, 91.44, 88.81, 95.93, 97.90),
}


def published(name: str | None, task: str) -> str:
    """In words, for a table: a number, "fail", or nothing."""
    if name not in PUBLISHED or task not in TASKS:
        return ""
    value = PUBLISHED[name][TASKS.index(task)]
    if value is None:
        return "fail"
    return "" if value != value else f"{value:.2f}"
