"""What is trained on a task: ``configs/lra/NAME.yaml``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from seqmodels.configuration import ConfigError, apply_overrides, convert, load_yaml, nearest
from seqmodels.models.config import ClassifierConfig
from seqmodels.tasks.lra import Pixels, TaskData, task_named

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "lra"

Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW over ``epochs`` passes in a new order each; linear warm-up, then cosine to 0.

    Attributes:
        warmup_epochs: passes of linear rise.
        gradient_clip: of the total norm; null: none.
        precision: ``bfloat16`` runs the forward under autocast.
    """

    learning_rate: Annotated[float, Meta(gt=0)]
    batch_size: Positive
    epochs: Positive
    weight_decay: Annotated[float, Meta(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Meta(ge=0)] = 1.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    gradient_clip: Annotated[float, Meta(gt=0)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"


class TaskPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task.

    Attributes:
        model: a :class:`~seqmodels.models.ClassifierConfig` without inputs and outputs, which the task decides.
        pixels: mean and standard deviation that replace the task's scale of real inputs.
    """

    model: dict[str, Any]
    training: Training
    pixels: tuple[float, Annotated[float, Meta(gt=0)]] | None = None


class ModelPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of ``configs/lra``.

    Attributes:
        layer: registry name, for the rows.
        tasks: plans by task.
        published: its row in the published numbers.
        role: what it is in the locality ablation: "local" sees a short neighbourhood only.
        shared: a place for YAML anchors; not read.
    """

    layer: str
    tasks: dict[str, TaskPlan]
    published: str | None = None
    role: Literal["local"] | None = None
    shared: dict[str, Any] = {}


class Run(msgspec.Struct, frozen=True):
    """Everything that repeats one training."""

    task: str
    arm: str
    layer: str
    seed: int
    model: dict[str, Any]
    training: Training
    pixels: tuple[float, float] | None
    published: str | None
    role: str | None

    @property
    def digest(self) -> str:
        """Of the whole content: a finished run is kept when the same one is asked for again."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:12]

    def scale(self) -> Pixels | None:
        """How pixels become real inputs; None for tokens."""
        default = task_named(self.task).pixels
        return default if default is None or self.pixels is None else Pixels(*self.pixels)


def plan_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_run(name: str, task: str, seed: int, overrides: Iterable[str] = ()) -> Run:
    """The plan of ``configs/lra/NAME.yaml`` (or of the file ``NAME``) for ``task``.

    Args:
        overrides: ``key=value`` inside the task's plan, such as ``training.epochs=2``.

    Raises:
        ConfigError: unknown names (with the nearest), keys, layers or layer arguments.
    """
    task_named(task)
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = plan_names()
        raise ConfigError(
            f"unknown configuration {name!r}.{nearest(name, known)} Known: {', '.join(known)}, or a YAML file"
        )
    data = load_yaml(path)
    known = convert(data, ModelPlan).tasks
    if task not in known:
        raise ConfigError(f"{path} has no task {task!r}. It has {', '.join(known)}; add the task to a copy of it")
    data["tasks"][task] = apply_overrides(data["tasks"][task], overrides)
    plan = convert(data, ModelPlan)
    chosen = plan.tasks[task]
    run = Run(
        task, path.stem, plan.layer, seed, chosen.model, chosen.training, chosen.pixels, plan.published, plan.role
    )
    classifier_config(run, vocab_size=2)
    return run


def classifier_config(run: Run, vocab_size: int | None) -> ClassifierConfig:
    """The run's model for its task's inputs and outputs; every layer's arguments are checked."""
    task = task_named(run.task)
    inputs = {"input_size": 1} if task.pixels is not None else {"vocab_size": vocab_size}
    fixed = {"num_classes": task.num_classes, "sequences": task.sequences, **inputs}
    if taken := sorted(set(fixed) & set(run.model)):
        raise ConfigError(f"model.{taken[0]} is decided by the task {run.task!r}; leave it out")
    config = convert({**run.model, **fixed}, ClassifierConfig, "model")
    config.check_layers()
    return config


def plan_of_data(run: Run, data: TaskData) -> ClassifierConfig:
    """As :func:`classifier_config`, with the vocabulary that was found in the data."""
    return classifier_config(run, data.vocab_size)
