"""The cells of the study: what is built, trained and measured in each."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any, Literal

import msgspec

Study = Literal["throughput", "routing", "memory", "facts"]
SEEDS = (0, 1, 2)
ON, FLAT, OFF = "workspace on", "workspace on, addresses of deviation 1", "workspace off"
WORKSPACES: dict[str, dict[str, Any]] = {
    ON: {"workspace": True, "address_std": 8.0},
    FLAT: {"workspace": True, "address_std": 1.0},
    OFF: {"workspace": False},
}


class Cell(msgspec.Struct, frozen=True):
    """One process: a study, what is varied in it, and the sizes."""

    suite: str
    study: Study
    arm: str
    seed: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.study}/{self.arm}"

    @property
    def layer(self) -> str:
        return {"routing": "chunk_moe", "memory": "workspace", "facts": "product_key_memory"}.get(self.study, "hydra")

    @property
    def digest(self) -> str:
        """Of the whole content: a finished cell is kept when a suite is started again with the same one."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:12]


SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "throughput": {
            "lengths": [512, 1024, 2048, 4096, 8192],
            "d_model": 128,
            "blocks": 6,
            "rounds": 2,
            "decode_rounds": 10,
            "tokens": 16,
        },
        "routing": {"steps": 250, "batch_size": 8, "learning_rate": 3e-3},
        "memory": {
            "steps": 200,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "rows": 512,
        },
        "facts": {"steps": 600, "batch_size": 256, "learning_rate": 3e-3, "facts": 2048},
    },
    "smoke": {
        "throughput": {"lengths": [64], "d_model": 32, "blocks": 3, "rounds": 1, "decode_rounds": 1, "tokens": 2},
        "routing": {"steps": 3, "batch_size": 2, "learning_rate": 3e-3},
        "memory": {"steps": 3, "batch_size": 2, "learning_rate": 3e-3, "rows": 8},
        "facts": {"steps": 3, "batch_size": 8, "learning_rate": 3e-3, "facts": 8},
    },
}


def suite_cells(suite: str) -> list[Cell]:
    """All cells of ``suite``, the longest first.

    Raises:
        ValueError: an unknown suite.
    """
    if suite not in SIZES:
        raise ValueError(f"unknown suite {suite!r}; expected one of {', '.join(SIZES)}")
    sizes = SIZES[suite]
    cells = []
    for (mixer, arm), seed in itertools.product(itertools.product(("gated_conv", "hydra_diag"), WORKSPACES), SEEDS):
        options = {**sizes["memory"], "mixer": mixer, **WORKSPACES[arm]}
        if mixer == "gated_conv" or arm != FLAT:
            cells.append(Cell(suite, "memory", f"{mixer}/{arm}", seed, options))
    for memory, seed in itertools.product(("on", "off"), SEEDS):
        cells.append(Cell(suite, "facts", f"memory {memory}", seed, {**sizes["facts"], "memory": memory == "on"}))
    for temperature, weight, seed in itertools.product((0.5, 1.0, 2.0), (0.0, 1e-2), SEEDS):
        options = {**sizes["routing"], "temperature": temperature, "balance_weight": weight}
        cells.append(Cell(suite, "routing", f"tau={temperature:g},alpha={weight:g}", seed, options))
    timing = dict(sizes["throughput"])
    for length in timing.pop("lengths"):
        cells.append(Cell(suite, "throughput", f"L{length}", 0, {**timing, "length": length}))
    return cells
