"""Protocols: what is trained on what, over which grid; a cell is one run of it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from evals.recall.layers import LayerDefaults, load_layers
from seqmodels.configuration import ConfigError, load, nearest
from seqmodels.mixers import MIXERS
from seqmodels.tasks.recall.registry import row_length, task_named

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "recall"
NOT_SUITES = ("layers",)
TUNING_SEED = 1000  # seeds from here on choose learning rates: suites measure with others
TUNING_SUFFIX = "_rates"  # of the name of a suite whose rates were tried

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Rate = Annotated[float, Meta(gt=0)]
Reads = Literal["once", "twice"]


class DataSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``count`` examples of the task's generator with ``settings``."""

    count: Positive
    settings: dict[str, Any] = {}

    @property
    def label(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.settings.items())


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run: AdamW.

    Attributes:
        epochs: at most; ``stop_above`` ends a run after an epoch whose test accuracy exceeds it.
        schedule: ``epoch_cosine`` sets the rate once an epoch, falling to 0 after the last;
            ``step_cosine`` falls every step to ``final_fraction``; ``constant`` stays.
        shuffle: a new order of rows, and of the batches of several training sets, each epoch. Without it the
            sets are served in order, as they are.
        fresh: new examples each epoch instead of the same ones.
        evaluate_every: epochs between evaluations.
        seconds: of processor time on a CPU, of wall time on a GPU, data and tests included, after which a run
            ends; null: none.
        precision: ``bfloat16`` runs the forward under autocast.
        compile: run the training step through torch.compile; pays from a few minutes a cell on.
    """

    batch_size: Positive
    epochs: Positive
    stop_above: Fraction | None = None
    schedule: Literal["epoch_cosine", "step_cosine", "constant"] = "epoch_cosine"
    final_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    gradient_clip: Rate | None = 1.0
    dropout: Fraction = 0.0
    shuffle: bool = True
    fresh: bool = False
    evaluate_every: Positive = 1
    seconds: Rate | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is swept for every arm; the best learning rate and weight decay are chosen at each width and depth.

    Attributes:
        learning_rate: empty takes the stored rate of the arm's layer (configs/recall/layers.yaml).
        depth: what ``{depth}`` in a pattern stands for.
        seeds: runs at each point, with seeds 0, 1, ...
    """

    d_model: tuple[Positive, ...]
    learning_rate: tuple[Rate, ...] = ()
    weight_decay: tuple[NonNegative, ...] = (0.1,)
    depth: tuple[Positive, ...] = (2,)
    seeds: Positive = 1

    def __post_init__(self) -> None:
        for name in ("d_model", "weight_decay", "depth"):
            if not getattr(self, name):
                raise ValueError(f"grid.{name} is empty; expected at least one value")


class TaskPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task of a suite.

    Attributes:
        task: the generator's name; the plan's own name when absent.
        train, test: data sets; the score is the mean over the test sets.
        vary: setting to values: each value alone changes the plan (``train`` as a name: the number of
            training examples); every variation is trained and tested apart.
        training, grid: the suite's unless given.
        chance: accuracy of guessing, for the report and the controls.
    """

    train: tuple[DataSet, ...]
    test: tuple[DataSet, ...]
    task: str | None = None
    vary: dict[str, tuple[Any, ...]] = {}
    training: Training | None = None
    grid: Grid | None = None
    chance: float | None = None

    def __post_init__(self) -> None:
        if not self.train or not self.test:
            raise ValueError("a task needs at least one training set and one test set")


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One contestant.

    Attributes:
        layer: registry name; the word ``{layer}`` of the pattern.
        pattern: instead of the suite's.
        arguments: of the layer, over those of layers.yaml.
        published: its row in the published numbers.
        learning_rate: stored rate by task, over that of layers.yaml.
        learned_positions: instead of what layers.yaml says of the layer.
        reads: ``twice`` shows the whole row once more in front of it, for tasks that ask at the last token alone.
    """

    layer: str
    pattern: str | None = None
    arguments: dict[str, Any] = {}
    published: str | None = None
    learning_rate: dict[str, Rate] = {}
    learned_positions: bool | None = None
    reads: Reads = "once"


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A protocol file.

    Attributes:
        pattern: of the model, with ``{layer}`` and ``{depth}``.
        every_layer: an arm for each causal layer that ships, beside ``arms``.
        layers: arguments of other words of the patterns.
        norm: of the blocks.
        state_context: context length at which state is counted; the longest test when absent.
        controls: arm to ``solves`` (every task named in ``control_tasks`` above 0.95) or ``fails`` (below 0.25).
    """

    device: Literal["cpu", "cuda"]
    tasks: dict[str, TaskPlan]
    training: Training
    grid: Grid
    pattern: str
    arms: dict[str, Arm] = {}
    every_layer: bool = False
    layers: dict[str, dict[str, Any]] = {}
    norm: Literal["layer", "rms"] = "layer"
    state_context: Positive | None = None
    controls: dict[str, Literal["solves", "fails"]] = {}
    control_tasks: tuple[str, ...] = ()


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run: everything that repeats it."""

    suite: str
    device: str
    plan: str
    task: str
    train: tuple[DataSet, ...]
    test: tuple[DataSet, ...]
    arm: str
    layer: str
    pattern: str
    layers: dict[str, dict[str, Any]]
    norm: str
    learned_positions: bool
    d_model: int
    depth: int
    learning_rate: float
    weight_decay: float
    seed: int
    training: Training
    state_context: int
    published: str | None
    control: str | None
    chance: float | None
    reads: Reads = "once"

    @property
    def point(self) -> str:
        """Its place in the grid, without what is chosen."""
        return f"d={self.d_model},depth={self.depth}"

    @property
    def choice(self) -> str:
        """What is chosen at a point."""
        return f"lr={self.learning_rate:g},wd={self.weight_decay:g}"

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.plan}/{self.arm}/{self.point},{self.choice}"

    @property
    def digest(self) -> str:
        """Of all that decides the run: what a report says beside it may change, and the run stays finished."""
        content = msgspec.structs.replace(self, published=None, control=None, chance=None)
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:12]


def suite_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in NOT_SUITES)


def load_suite(name: str, tasks: Sequence[str] = (), arms: Sequence[str] = ()) -> Suite:
    """``configs/recall/NAME.yaml`` or the file ``NAME``, reduced to the tasks and arms named.

    Raises:
        ValueError: unknown suite, task, arm, layer or setting (with the nearest names).
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists() or name in NOT_SUITES:
        known = suite_names()
        raise ConfigError(f"unknown suite {name!r}.{nearest(name, known)} Known: {', '.join(known)}, or a YAML file")
    suite = load(path, Suite)
    if suite.every_layer:
        shipped = [layer for layer in MIXERS.shipped() if MIXERS[layer].causality == "causal"]
        suite = msgspec.structs.replace(suite, arms={**{layer: Arm(layer) for layer in shipped}, **suite.arms})
    for arm in suite.controls:
        if arm not in suite.arms:
            raise ConfigError(f"{path.name}: control {arm!r} is no arm.{nearest(arm, suite.arms)}")
    for plan in suite.control_tasks:
        if plan not in suite.tasks:
            raise ConfigError(f"{path.name}: control task {plan!r} is no task.{nearest(plan, suite.tasks)}")
    for plan_name, plan in suite.tasks.items():
        task = task_named(plan.task or plan_name)
        for data in (*plan.train, *plan.test):
            task.settings(data.settings)
    return msgspec.structs.replace(
        suite, tasks=_chosen("task", suite.tasks, tasks, path), arms=_chosen("arm", suite.arms, arms, path)
    )


def _chosen(kind: str, known: dict[str, Any], wanted: Sequence[str], path: Path) -> dict[str, Any]:
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{path.name} has no {kind} {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    return {name: value for name, value in known.items() if not wanted or name in wanted}


def grid_cells(name: str, suite: Suite, layers: LayerDefaults | None = None) -> list[Cell]:
    """Every point of every arm and task, variations included."""
    layers = layers or load_layers(FOLDER / "layers.yaml")
    cells = []
    plans = itertools.chain.from_iterable(_variations(*item) for item in suite.tasks.items())
    for (plan_name, base, plan), (arm_name, arm) in itertools.product(plans, suite.arms.items()):
        task = plan.task or base
        grid, training = plan.grid or suite.grid, plan.training or suite.training
        positions = layers.learned_positions(arm.layer) if arm.learned_positions is None else arm.learned_positions
        stored = arm.learning_rate.get(task) or arm.learning_rate.get("default") or layers.rate(arm.layer, task)
        for d_model, depth, rate, decay, seed in itertools.product(
            grid.d_model, grid.depth, grid.learning_rate or (stored,), grid.weight_decay, range(grid.seeds)
        ):
            arguments = {arm.layer: {**layers.arguments(arm.layer), **arm.arguments}}
            pattern = (arm.pattern or suite.pattern).format(layer=arm.layer, depth=depth)
            words = {word: layers.arguments(word) for word in MIXERS.names() if _has_word(pattern, word)}
            cells.append(
                Cell(
                    suite=name, device=suite.device, plan=plan_name, task=task, train=plan.train, test=plan.test,
                    arm=arm_name, layer=arm.layer, pattern=pattern, layers={**words, **suite.layers, **arguments},
                    norm=suite.norm, learned_positions=positions, d_model=d_model,
                    depth=depth, learning_rate=rate, weight_decay=decay, seed=seed, training=training,
                    state_context=suite.state_context or max(tokens_of(task, data, arm.reads) for data in plan.test),
                    published=arm.published or arm.layer,
                    control=suite.controls.get(arm_name) if base in suite.control_tasks else None,
                    chance=plan.chance, reads=arm.reads,
                )
            )  # fmt: skip
    return cells


def tokens_of(task: str, data: DataSet, reads: Reads) -> int:
    """Tokens of a row as the model reads it."""
    return row_length(task, data.settings) * (2 if reads == "twice" else 1)


def _has_word(pattern: str, word: str) -> bool:
    return word in pattern.replace("(", " ").replace(")", " ").replace(">", " ").split() or any(
        part.partition("x")[2] == word for part in pattern.replace("(", " ").replace(")", " ").split()
    )


def _variations(name: str, plan: TaskPlan) -> list[tuple[str, str, TaskPlan]]:
    """The plan itself, and one for each varied value: name, name of the plan it varies, plan."""
    found = [(name, name, plan)]
    for setting, values in plan.vary.items():
        for value in values:
            if setting == "train":
                change = {"train": tuple(msgspec.structs.replace(data, count=value) for data in plan.train)}
            else:
                change = {
                    part: tuple(
                        msgspec.structs.replace(data, settings={**data.settings, setting: value})
                        for data in getattr(plan, part)
                    )
                    for part in ("train", "test")
                }
            found.append((f"{name}[{setting}={value}]", name, msgspec.structs.replace(plan, **change)))
    return found
