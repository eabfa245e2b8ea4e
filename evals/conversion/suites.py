"""The cells of a suite: teachers by seed, and what is made of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

from seqmodels.convert.hedgehog.settings import (
    AttentionSettings,
    ConversionSettings,
    DistillationSettings,
    FinetuningSettings,
)
from seqmodels.training.config import DataConfig, ScheduleConfig

SUITES = ("cpu",)
TEACHER = "teacher"


class Teacher(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Llama of bytes, trained from scratch."""

    hidden_size: int
    layers: int
    heads: int
    key_heads: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    data: DataConfig
    seed: int

    @property
    def digest(self) -> str:
        return _digest(self)


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A teacher's training (``conversion`` None), or one conversion of it; ``model`` is filled in by the cell."""

    suite: str
    arm: str
    layer: str
    teacher: Teacher
    conversion: ConversionSettings | None = None

    @property
    def seed(self) -> int:
        return self.teacher.seed

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.arm}"

    @property
    def digest(self) -> str:
        return _digest(self)


def cells(suite: str, seeds: int = 3) -> tuple[list[Cell], list[Cell]]:
    """Teachers, and the conversions that need them.

    Raises:
        ValueError: an unknown suite.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; expected one of {', '.join(SUITES)}")
    teachers = [_cpu_teacher(seed) for seed in range(seeds)]
    first = [Cell(suite=suite, arm=TEACHER, layer="attention", teacher=teacher) for teacher in teachers]
    return first, [cell for teacher in teachers for cell in _conversions(suite, teacher)]


def _cpu_teacher(seed: int) -> Teacher:
    return Teacher(
        hidden_size=128, layers=2, heads=4, key_heads=2, steps=400, batch_size=8, learning_rate=3e-3,
        weight_decay=0.1, warmup_steps=20, data=DataConfig(source="stdlib", tokenizer="bytes", sequence_length=256),
        seed=seed,
    )  # fmt: skip


def _conversions(suite: str, teacher: Teacher) -> Iterator[Cell]:
    """Both kinds, trained; what the same fine-tuning does to the teacher; and the controls without training."""
    stages = {
        "distillation": DistillationSettings(steps=200, learning_rate=1e-2),
        "finetuning": FinetuningSettings(steps=300, method="full", learning_rate=2e-3),
    }
    untrained = {"distillation": DistillationSettings(steps=0), "finetuning": FinetuningSettings(method="none")}
    window: dict[str, Any] = {"kind": "hedgehog_window", "window": 8}
    arms: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("hedgehog", "hedgehog", {"kind": "hedgehog"}, stages),
        ("hedgehog_window", "hedgehog_window", window, stages),
        ("teacher trained on", "attention", {"kind": "softmax"}, stages),
        ("softmax kept", "attention", {"kind": "softmax"}, untrained),
        ("relu, untrained", "hedgehog", {"kind": "hedgehog", "feature_map": "relu"}, untrained),
    ]
    for arm, layer, attention, training in arms:
        yield Cell(
            suite=suite, arm=arm, layer=layer, teacher=teacher,
            conversion=ConversionSettings(
                model="teacher", attention=AttentionSettings(**attention), data=teacher.data, batch_size=8,
                schedule=ScheduleConfig(), evaluation_rows=64, device="cpu", seed=teacher.seed, **training,
            ),
        )  # fmt: skip


def _digest(value: Any) -> str:
    return hashlib.blake2b(msgspec.json.encode(value), digest_size=8).hexdigest()
