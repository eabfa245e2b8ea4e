"""A corpus and a configuration small enough that a run takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seqmodels.tasks.shuffle import raw_draws
from seqmodels.training.config import TrainConfig, convert_train_config

WORDS = b"state space model layer token carry scan decay head chunk".split()


def write_corpus(folder: Path, files: int = 12) -> Path:
    """Text files of some hundred bytes each, the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        draws = raw_draws(7, index, count=60 + 5 * index)
        (folder / f"file_{index:02d}.txt").write_bytes(b" ".join(WORDS[int(draw) % len(WORDS)] for draw in draws))
    return folder


def tiny_data(folder: Path, **changes: Any) -> dict[str, Any]:
    """A training configuration as plain values; ``changes`` replace top-level keys."""
    values: dict[str, Any] = {
        "model": {
            "vocab_size": 256,
            "d_model": 16,
            "pattern": "gated_conv linear_attention swiglu",
            "layers": {"linear_attention": {"num_heads": 2, "decay": "fixed"}},
            "dropout": 0.1,
        },
        "data": {
            "source": str(folder / "corpus"),
            "cache": str(folder / "cache"),
            "sequence_length": 32,
            "validation_fraction": 0.2,
        },
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 3, "keep": 2},
        "steps": 8,
        "batch_size": 4,
        "log_every": 2,
        "validate_every": 4,
        "validation_rows": 8,
        "seed": 3,
    }
    return {**values, **changes}


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """The configuration, with its corpus written."""
    write_corpus(folder / "corpus")
    return convert_train_config(tiny_data(folder, **changes))
