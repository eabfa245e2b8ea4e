"""The tasks by name: what they are, where their data lie, and how the data are had."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from seqmodels.configuration import ConfigError, nearest
from seqmodels.tasks.lra import listops, shards
from seqmodels.tasks.lra.digits import load_digits
from seqmodels.tasks.lra.examples import Examples, Pixels
from seqmodels.tasks.lra.loaders import RETRIEVAL_LENGTH, TEXT_LENGTH, load_image, load_retrieval, load_text
from seqmodels.tasks.lra.makers import make_listops, make_pathfinder


class TaskData(NamedTuple):
    """Splits of a task; ``vocab_size`` is None for pixels."""

    train: Examples
    validation: Examples
    test: Examples
    vocab_size: int | None

    @property
    def digest(self) -> str:
        """Of the content of all splits: two runs with the same one saw the same data."""
        parts = "".join(shards.digest_of(part) for part in (self.train, self.validation, self.test))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


class Generated(NamedTuple):
    """How a task's data are made: see :func:`seqmodels.tasks.lra.shards.generate`."""

    maker: shards.Maker
    settings: dict[str, Any]
    count: int
    shard_size: int


class Task(NamedTuple):
    """One task of the suite.

    Attributes:
        title: its column in published tables.
        num_classes, sequences: of the classifier.
        max_length: of a row, end mark included.
        selection: the split by which the epoch is chosen: Text has no validation split.
        pixels: the default scale of real inputs; None for tokens.
        load: data folder to splits.
        generated: how the data are made; None for data that are loaded.
    """

    title: str
    num_classes: int
    max_length: int
    load: Callable[[Path], TaskData]
    sequences: Literal[1, 2] = 1
    selection: Literal["validation", "test"] = "validation"
    pixels: Pixels | None = None
    generated: Generated | None = None


def default_folder() -> Path:
    """``$SEQMODELS_LRA_DATA``, or ``seqmodels/lra`` in the user's cache folder."""
    chosen = os.environ.get("SEQMODELS_LRA_DATA")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqmodels" / "lra"


def task_named(name: str) -> Task:
    """Raises ConfigError for an unknown name, with the nearest known ones."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}.{nearest(name, TASKS)} Known: {', '.join(TASKS)}")
    return TASKS[name]


def load_task(name: str, folder: Path | None = None) -> TaskData:
    """The splits of task ``name`` from ``folder/name`` and its like.

    Raises:
        ConfigError: an unknown task.
        DataError: missing, partial or damaged data, with what makes or gets them.
    """
    return task_named(name).load(default_folder() if folder is None else folder)


def generate_task(
    name: str, folder: Path | None = None, *, jobs: int = 1,
    done: Callable[[int, int], None] = lambda finished, shards: None,
) -> tuple[Path, str]:  # fmt: skip
    """Makes what is missing of task ``name`` in ``folder/name``: the folder, and the digest of the content."""
    plan = task_named(name).generated
    if plan is None:
        known = ", ".join(other for other, task in TASKS.items() if task.generated is not None)
        raise ConfigError(f"task {name!r} is not generated, it is loaded; generated are {known}")
    target = (default_folder() if folder is None else folder) / name
    return target, shards.generate(target, plan.maker, plan.settings, plan.count, plan.shard_size, jobs=jobs, done=done)


def _load_generated(name: str, folder: Path, plan: Generated) -> Examples:
    return shards.load(folder / name, plan.settings, f"python -m evals.lra generate {name} --data {folder}")


def _listops(name: str, lengths: listops.Lengths, sizes: tuple[int, int, int], shard_size: int) -> Task:
    """Slices in the order of generation: training, validation, test."""
    plan = Generated(make_listops, {"task": "listops", **lengths._asdict(), "seed": 0}, sum(sizes), shard_size)
    train, validation = sizes[0], sizes[0] + sizes[1]

    def load(folder: Path) -> TaskData:
        everything = _load_generated(name, folder, plan)
        return TaskData(
            everything.select(0, train), everything.select(train, validation),
            everything.select(validation, len(everything)), listops.VOCAB_SIZE,
        )  # fmt: skip

    length = min(lengths.below, listops.TRUNCATED + 1)
    return Task("ListOps", 10, length, load, generated=plan)


def _pathfinder(side: int, shard_size: int) -> Task:
    """Shards in the order of generation: the first 80 % for training, then 10 % each."""
    name, count = f"pathfinder{side}", 200_000
    plan = Generated(make_pathfinder, {"task": "pathfinder", "side": side, "seed": 0}, count, shard_size)

    def load(folder: Path) -> TaskData:
        everything = _load_generated(name, folder, plan)
        train, validation = count * 8 // 10, count * 9 // 10
        return TaskData(
            everything.select(0, train),
            everything.select(train, validation),
            everything.select(validation, count),
            None,
        )

    title = "Path-X" if side == 128 else "Pathfinder"
    return Task(title, 2, side * side, load, pixels=Pixels(0.5, 0.5), generated=plan)


def _digits(folder: Path) -> TaskData:
    return TaskData(*load_digits(), None)


def _text(folder: Path) -> TaskData:
    splits, vocab_size = load_text(folder)
    return TaskData(*splits, vocab_size)


def _retrieval(folder: Path) -> TaskData:
    splits, vocab_size = load_retrieval(folder)
    return TaskData(*splits, vocab_size)


def _image(folder: Path) -> TaskData:
    return TaskData(*load_image(folder), None)


TASKS: dict[str, Task] = {
    "listops": _listops("listops", listops.Lengths(), (96_000, 2000, 2000), 1000),
    "text": Task("Text", 2, TEXT_LENGTH, _text, selection="test"),
    "retrieval": Task("Retrieval", 2, RETRIEVAL_LENGTH, _retrieval, sequences=2),
    "image": Task("Image", 10, 1024, _image, pixels=Pixels(122.6 / 255, 61 / 255)),
    "pathfinder32": _pathfinder(32, 1000),
    "pathfinder128": _pathfinder(128, 250),
    "listops-256": _listops("listops-256", listops.Lengths(100, 256), (16_000, 1000, 2000), 1000),
    "digits": Task("digits", 10, 64, _digits, pixels=Pixels(0.3, 0.37)),
}
