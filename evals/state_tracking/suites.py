"""Protocols: what is trained on what, for how long, over which grid."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from seqmodels.configuration import ConfigError, load, nearest
from seqmodels.models.arguments import layer_class
from seqmodels.tasks.state_tracking import BRACKETS, MIN_BRACKETS, generate, task_named

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "state_tracking"
TIME_STEP = ("dt_min", "dt_max")

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``steps`` optimiser steps on ``batch_size`` sequences of lengths uniform in [min_length, max_length]."""

    steps: Positive
    batch_size: Positive
    min_length: Positive
    max_length: Positive


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. AdamW, linear warm-up, cosine to 0.

    Attributes:
        stages: the curriculum.
        every_token: a loss after every token (parity only), not only at the answer.
        label_smoothing: keeps a gradient on how exact the state is after every answer is right.
        validate_every: steps between validations, ``validation_count`` sequences of length ``validation_length``.
    """

    stages: tuple[Stage, ...]
    validation_length: Positive
    validate_every: Positive
    validation_count: Positive = 256
    every_token: bool = False
    label_smoothing: Fraction = 0.0
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup_steps: Positive = 1
    gradient_clip: Annotated[float, Meta(gt=0)] = 1.0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("training.stages is empty; expected at least one stage")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} exceeds the {self.steps} steps of all stages")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hyperparameters that are searched, the same for every arm.

    Attributes:
        time_step: name to the range in which a layer's time step starts. Arms whose layer has none get
            as many runs instead, with other seeds.
        seeds: runs at the chosen point; the grid itself is searched with the first seed.
    """

    learning_rate: tuple[Annotated[float, Meta(gt=0)], ...]
    d_model: tuple[Positive, ...]
    time_step: dict[str, tuple[float, float]]
    seeds: Positive = 1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "d_model", "time_step"):
            if not getattr(self, name):
                raise ValueError(f"grid.{name} is empty; expected at least one value")


class TaskPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is done for one task; ``blocks`` is the number of (layer, channel module) pairs."""

    blocks: Positive
    training: Training
    grid: Grid
    test_lengths: tuple[Positive, ...]
    test_count: Positive


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One contestant.

    Attributes:
        layer, arguments: registry name and constructor arguments.
        published: its row in the published numbers.
        control: "solves" must reach the top of parity, "fails" must stay at the bottom.
    """

    layer: str
    arguments: dict[str, Any] = {}
    published: str | None = None
    control: Literal["solves", "fails"] | None = None


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A protocol file. ``channel`` stands behind every layer, with its arguments; null for none."""

    device: Literal["cpu", "cuda"]
    tasks: dict[str, TaskPlan]
    arms: dict[str, Arm]
    channel: str | None = None
    channel_arguments: dict[str, Any] = {}


class Cell(msgspec.Struct, frozen=True):
    """One run: everything that repeats it."""

    suite: str
    device: str
    task: str
    arm: str
    layer: str
    arguments: dict[str, Any]
    channel: str | None
    channel_arguments: dict[str, Any]
    blocks: int
    d_model: int
    learning_rate: float
    time_step: str
    seed: int
    training: Training
    test_lengths: tuple[int, ...]
    test_count: int
    published: str | None
    control: str | None

    @property
    def point(self) -> str:
        """Its place in the grid."""
        return f"lr={self.learning_rate:g},d={self.d_model},dt={self.time_step}"

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}/{self.point}"

    @property
    def digest(self) -> str:
        """Of the whole content: a finished cell is kept when a suite is started again with the same one."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:12]


def load_suite(name: str, tasks: Sequence[str] = (), arms: Sequence[str] = ()) -> Suite:
    """``configs/state_tracking/NAME.yaml`` or the file ``NAME``, reduced to the tasks and arms named.

    Raises:
        ValueError: unknown suite, task, arm or layer (with the nearest names), lengths too short for a task.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        raise ConfigError(f"unknown suite {name!r}.{nearest(name, known)} Known: {', '.join(known)}, or a YAML file")
    suite = load(path, Suite)
    suite = msgspec.structs.replace(
        suite, tasks=_chosen("task", suite.tasks, tasks, path), arms=_chosen("arm", suite.arms, arms, path)
    )
    for task, plan in suite.tasks.items():
        _check_lengths(task, plan)
    for arm in suite.arms.values():
        layer_class(arm.layer)
    return suite


def _chosen(kind: str, known: dict[str, Any], wanted: Sequence[str], path: Path) -> dict[str, Any]:
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{path.name} has no {kind} {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    return {name: value for name, value in known.items() if not wanted or name in wanted}


def _check_lengths(name: str, plan: TaskPlan) -> None:
    task = task_named(name)
    training = plan.training
    if training.every_token and not task.has_running_answer:
        raise ConfigError(f"{name}: training.every_token needs an answer after every token; set it to false")
    for stage in training.stages:
        if not task.min_length <= stage.min_length <= stage.max_length:
            raise ConfigError(
                f"{name}: a stage has lengths {stage.min_length} to {stage.max_length}; "
                f"expected {task.min_length} <= min_length <= max_length"
            )
    if training.validation_length < task.min_length:
        raise ConfigError(f"{name}: validation_length is {training.validation_length}; at least {task.min_length}")
    for length in plan.test_lengths:
        if length < max(task.min_length, MIN_BRACKETS if name == BRACKETS else 0):
            raise ConfigError(f"{name}: test length {length} is too short")
        exists = int(generate(name, 1, length, length, seed=0).lengths[0]) + task.unread
        if exists != length:
            raise ConfigError(f"{name}: no sequence has test length {length}; the nearest is {exists}")
    if not plan.test_lengths:
        raise ConfigError(f"{name}: test_lengths is empty; expected at least one length")


def grid_cells(name: str, suite: Suite) -> list[Cell]:
    """Every grid point of every arm and task with its first seed; an axis that a layer lacks becomes seeds."""
    cells = []
    for (task, plan), (arm_name, arm) in itertools.product(suite.tasks.items(), suite.arms.items()):
        has_time_step = set(TIME_STEP) <= set(inspect.signature(layer_class(arm.layer)).parameters)
        points = itertools.product(plan.grid.learning_rate, plan.grid.d_model, enumerate(plan.grid.time_step.items()))
        for rate, d_model, (index, (step_name, step_range)) in points:
            time_step = dict(zip(TIME_STEP, step_range, strict=True)) if has_time_step else {}
            cells.append(
                Cell(
                    name, suite.device, task, arm_name, arm.layer, {**arm.arguments, **time_step}, suite.channel,
                    suite.channel_arguments, plan.blocks, d_model, rate, step_name if has_time_step else "none",
                    0 if has_time_step else index, plan.training, plan.test_lengths, plan.test_count,
                    arm.published, arm.control,
                )
            )  # fmt: skip
    return cells


def more_seeds(chosen: Cell, grid: Grid, searched: Sequence[Cell]) -> list[Cell]:
    """The chosen point of an arm with ``grid.seeds - 1`` seeds that its grid has not seen there."""
    first = 1 + max(cell.seed for cell in searched if cell.point == chosen.point)
    return [msgspec.structs.replace(chosen, seed=first + more) for more in range(grid.seeds - 1)]
