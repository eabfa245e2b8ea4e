"""Published numbers of the recall protocols, by suite. Accuracies read off a plot are right to about 0.02."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """Where numbers are from.

    Attributes:
        title: of the table.
        from_plot: read off a figure, so right to 0.02 only.
    """

    title: str
    from_plot: bool


ZOOLOGY = Source("Zoology (arXiv 2312.04927), figure 2", from_plot=True)
BASED = Source("Based (arXiv 2402.18668), figure 2", from_plot=True)
MAD = Source("DeltaNet (arXiv 2406.06484), table of MAD (arXiv 2403.17844)", from_plot=False)
MAMBA = Source("Mamba (arXiv 2312.00752), induction heads at length 2^6 and on", from_plot=False)
SOURCES = {"zoology": ZOOLOGY, "based": BASED, "mad": MAD, "induction": MAMBA}

ZOOLOGY_WIDTHS = (64, 128, 256, 512)
# Length: accuracy at each width.
ZOOLOGY_ACCURACY: dict[str, dict[int, tuple[float, ...]]] = {
    "Attention": {length: (1.0, 1.0, 1.0, 1.0) for length in (64, 128, 256, 512)},
    "Hyena": {64: (0.52, 0.75, 0.84, 0.87), 128: (0.17, 0.63, 0.74, 0.84), 256: (0.05, 0.13, 0.54, 0.69)},
    "RWKV-4": {64: (0.77, 0.94, 0.97, 1.0), 128: (0.17, 0.50, 0.75, 0.92), 256: (0.05, 0.06, 0.67, 0.79)},
    "H3": {64: (0.93, 1.0, 0.99, 0.98), 128: (0.25, 0.74, 0.91, 0.76), 256: (0.05, 0.64, 0.62, 0.67)},
    "BaseConv": {64: (0.70, 0.94, 0.97, 1.0), 128: (0.37, 0.61, 0.84, 0.96), 256: (0.14, 0.33, 0.81, 0.94)},
}

# (state bytes over all layers at 1024 tokens in float32, mean accuracy)
BASED_POINTS: dict[str, tuple[tuple[float, float], ...]] = {
    "Attention": ((525e3, 1.0),),
    "Sliding window": ((18e3, 0.15), (67e3, 0.52), (133e3, 0.66), (264e3, 0.80), (526e3, 0.94), (1.05e6, 1.0)),
    "Based": ((9.4e3, 0.67), (12.5e3, 0.72), (25e3, 0.84), (40e3, 0.91), (80e3, 0.985), (169e3, 0.99)),
    "Mamba": ((8.2e3, 0.52), (16e3, 0.70), (33e3, 0.79), (66e3, 0.83), (98e3, 0.85)),
    "Mamba-2": ((8.2e3, 0.52), (16e3, 0.69), (33e3, 0.79), (66e3, 0.83), (98e3, 0.84)),
    "GLA": ((4.8e3, 0.53), (18e3, 0.77), (68e3, 0.95)),
    "DeltaNet": ((8.9e3, 0.79), (34e3, 0.96), (133e3, 0.995)),
    "Gated DeltaNet": ((17e3, 0.89), (67e3, 0.99)),
    "RWKV-7": ((17e3, 0.82), (132e3, 0.91)),
    "H3": ((131e3, 0.25),),
    "Hyena": ((525e3, 0.19),),
}

MAD_TASKS = (
    "compression", "fuzzy_recall", "in_context_recall", "memorization", "noisy_recall", "mad_selective_copying",
)  # fmt: skip
MAD_SCORES: dict[str, tuple[float, ...]] = {
    "Attention": (0.516, 0.298, 0.941, 0.852, 0.868, 0.996),
    "Mamba": (0.527, 0.067, 0.904, 0.895, 0.901, 0.863),
    "Hyena": (0.452, 0.079, 0.817, 0.895, 0.788, 0.931),
    "GLA": (0.388, 0.069, 0.808, 0.633, 0.816, 0.886),
    "DeltaNet": (0.422, 0.357, 1.0, 0.528, 1.0, 1.0),
}

INDUCTION: dict[str, tuple[float, ...]] = {
    "Attention": (1.0, 0.996, 1.0, 0.586, 0.266, 0.188, 0.098, 0.109, 0.078),
    "Attention, rotary": (1.0, 1.0, 1.0, 0.836, 0.313, 0.184, 0.086, 0.090, 0.055),
    "Mamba": (1.0,) * 9,
}


def published(suite: str, plan: str, row: str | None, d_model: int) -> float | None:
    """The number of ``row`` for a plan and width; None where nothing is published."""
    task, _, variation = plan.partition("[")
    if suite == "zoology" and row in ZOOLOGY_ACCURACY and d_model in ZOOLOGY_WIDTHS:
        widths = ZOOLOGY_ACCURACY[row].get(int(task.removeprefix("L"))) if task.startswith("L") else None
        return None if widths is None else widths[ZOOLOGY_WIDTHS.index(d_model)]
    if suite == "mad" and row in MAD_SCORES and task in MAD_TASKS and not variation:
        return MAD_SCORES[row][MAD_TASKS.index(task)]
    return None
