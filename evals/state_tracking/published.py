"""Published scaled accuracies on parity, modular arithmetic without and with brackets.

Mamba-3's paper (arXiv 2603.15569, table of formal languages): 1 layer on parity, 3 on arithmetic, best
run of its grid, length 256. Grazzi et al. (arXiv 2411.12537): lengths 40 to 256.
"""

from __future__ import annotations

TASKS = ("parity", "modular_arithmetic", "modular_arithmetic_brackets")

MAMBA3_PAPER = {
    "Mamba-3": (1.0, 0.9851, 0.8775),
    "Mamba-3 with standard RoPE": (0.0156, 0.2070, 0.0262),
    "Mamba-3 without RoPE": (0.0227, 0.0149, 0.0072),
    "Mamba-2": (0.0090, 0.4781, 0.0088),
    "Gated DeltaNet [-1,1]": (1.0, 0.9925, 0.9350),
}
GRAZZI = {
    "Transformer": (0.022, 0.031, 0.025),
    "mLSTM": (0.087, 0.040, 0.034),
    "sLSTM": (1.0, 0.787, 0.173),
    "Mamba [0,1]": (0.0, 0.095, 0.092),
    "Mamba [-1,1]": (1.0, 0.241, 0.136),
    "DeltaNet [0,1]": (0.017, 0.314, 0.137),
    "DeltaNet [-1,1]": (1.0, 0.971, 0.200),
}
SOURCES = {"Mamba-3 paper": MAMBA3_PAPER, "Grazzi et al.": GRAZZI}


def published(name: str | None, task: str) -> float | None:
    """The number of row ``name`` for ``task``; None where nothing is published."""
    for table in SOURCES.values():
        if name in table and task in TASKS:
            return table[name][TASKS.index(task)]
    return None
