"""The tasks by name: what they are, where their data lie, and how the data are had."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from seqmodels.configuration import ConfigError, nearest
from seqmodels.tasks.lra import listops, release, shards
from seqmodels.tasks.lra.digits import load_digits
from seqmodels.tasks.lra.examples import Examples, Pixels
from seqmodels.tasks.lra.loaders import RETRIEVAL_LENGTH, TEXT_LENGTH, load_image, load_retrieval, load_text
from seqmodels.tasks.lra.makers import make_listops, make_pathfinder
from seqmodels.tasks.lra.shards import DataError
from seqmodels.tasks.lra.splits import PathfinderSplit, pathfinder_parts

Source = Literal["auto", "generated", "release"]


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
    distinct: bool


class DataOptions(NamedTuple):
    """Which data of a task, where there are several.

    Attributes:
        source: ``generated`` by this library, the files of the ``release``, or ``auto``: generated data where there
            are some, else the release.
        split: of Pathfinder: ``s4`` permutes as S4's and S5's code does, ``lra`` keeps the order of the files.
    """

    source: Source = "auto"
    split: PathfinderSplit = "s4"


class Task(NamedTuple):
    """One task of the suite.

    Attributes:
        title: its column in published tables.
        num_classes, sequences: of the classifier.
        max_length: of a row, end mark included.
        selection: the split by which the epoch is chosen: Text has no validation split.
        pixels: the default scale of real inputs; None for tokens.
        load: data folder and options to splits.
        generated: how the data are made; None for data that are loaded.
        takes: the options that it knows.
    """

    title: str
    num_classes: int
    max_length: int
    load: Callable[[Path, DataOptions], TaskData]
    sequences: Literal[1, 2] = 1
    selection: Literal["validation", "test"] = "validation"
    pixels: Pixels | None = None
    generated: Generated | None = None
    takes: tuple[str, ...] = ()


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


def load_task(name: str, folder: Path | None = None, options: DataOptions = DataOptions()) -> TaskData:  # noqa: B008
    """The splits of task ``name`` from ``folder/name`` and its like.

    Raises:
        ConfigError: an unknown task, or an option that it does not take.
        DataError: missing, partial or damaged data, with what makes or gets them.
    """
    task = task_named(name)
    for option, given, default in zip(options._fields, options, DataOptions(), strict=True):
        if given != default and option not in task.takes:
            known = ", ".join(other for other, about in TASKS.items() if option in about.takes)
            raise ConfigError(f"task {name!r} has no option {option}={given}; {option} is for {known}")
    return task.load(default_folder() if folder is None else folder, options)


def generated_plan(name: str) -> Generated:
    """How task ``name`` is made. Raises ConfigError for a task that is loaded."""
    plan = task_named(name).generated
    if plan is None:
        known = ", ".join(other for other, task in TASKS.items() if task.generated is not None)
        raise ConfigError(f"task {name!r} is not generated, it is loaded; generated are {known}")
    return plan


def generate_task(
    name: str, folder: Path | None = None, *, jobs: int = 1,
    done: Callable[[int, int], None] = lambda finished, shards: None,
) -> tuple[Path, str]:  # fmt: skip
    """Makes what is missing of task ``name`` in ``folder/name``: the folder, and the digest of the content."""
    plan = generated_plan(name)
    target = (default_folder() if folder is None else folder) / name
    digest = shards.generate(
        target, plan.maker, plan.settings, plan.count, plan.shard_size, jobs=jobs, distinct=plan.distinct, done=done
    )
    return target, digest


def _generated(name: str, folder: Path, plan: Generated) -> Examples:
    return shards.load(folder / name, plan.settings, f"python -m evals.lra generate {name} --data {folder}")


def _released(
    name: str, folder: Path, source: Source, found: Path | None, files: str, plan: Generated | None
) -> Path | None:
    """The folder of the released files; None: the data are generated. Errors say how to have either."""
    if plan is None and source == "generated":
        raise ConfigError(f"task {name!r} is not generated: leave out source=generated")
    made = plan is not None and shards.read_manifest(folder / name) is not None
    if source == "generated" or (source == "auto" and made):
        return None
    if found is None:
        make = f"Make them with: python -m evals.lra generate {name} --data {folder}\nor unpack"
        verb = "Unpack" if plan is None or source == "release" else make
        raise DataError(f"no data of {name} in {folder}. {verb} {release.WHERE} there ({files})")
    return found


def _listops(name: str, lengths: listops.Lengths, sizes: tuple[int, int, int], shard_size: int) -> Task:
    """Generated: slices in the order of generation, training, validation, test; or the released files."""
    settings = {"task": "listops", **lengths._asdict(), "seed": 0}
    plan = Generated(make_listops, settings, sum(sizes), shard_size, distinct=True)
    train, validation = sizes[0], sizes[0] + sizes[1]

    def load(folder: Path, options: DataOptions) -> TaskData:
        if name == "listops":
            files, found = "listops-1000/basic_{train,val,test}.tsv", release.find_listops(folder)
            place = _released(name, folder, options.source, found, files, plan)
            if place is not None:
                return TaskData(*release.load_listops(place), listops.VOCAB_SIZE)
        everything = _generated(name, folder, plan)
        return TaskData(
            everything.select(0, train), everything.select(train, validation),
            everything.select(validation, len(everything)), listops.VOCAB_SIZE,
        )  # fmt: skip

    length = min(lengths.below, listops.TRUNCATED + 1)
    takes = ("source",) if name == "listops" else ()
    return Task("ListOps", 10, length, load, generated=plan, takes=takes)


def _pathfinder(side: int, shard_size: int | None) -> Task:
    """Generated where there is a shard size, or the released pictures; either way split alike."""
    name = f"pathfinder{side}"
    settings = {"task": "pathfinder", "side": side, "seed": 0, "version": 2}  # 2: placed as the original places
    plan = None
    if shard_size is not None:
        plan = Generated(make_pathfinder, settings, release.PATHFINDER_SIZE, shard_size, distinct=False)

    def load(folder: Path, options: DataOptions) -> TaskData:
        files, found = f"{name}/{release.DIFFICULTY}/{{imgs,metadata}}", release.find_pathfinder(folder, side)
        place = _released(name, folder, options.source, found, files, plan)
        if place is not None:
            everything = release.load_pathfinder(place, side)
        else:
            assert plan is not None
            everything = _generated(name, folder, plan)
        train, validation, test = (
            _pictures(everything, part, side * side) for part in pathfinder_parts(len(everything), options.split)
        )
        return TaskData(train, validation, test, None)

    title = "Path-X" if side == 128 else "Pathfinder" if side == 32 else f"Pathfinder-{side}"
    takes = ("source", "split")
    return Task(title, 2, side * side, load, pixels=Pixels(0.5, 0.5), generated=plan, takes=takes)


def _pictures(everything: Examples, indices: np.ndarray, size: int) -> Examples:
    """As ``everything.take(indices)``, for rows of one size: without a loop over them."""
    values = everything.values.reshape(-1, size)[indices].reshape(-1)
    return Examples(values, np.arange(len(indices) + 1, dtype=np.int64) * size, everything.labels[indices])


def _digits(folder: Path, options: DataOptions) -> TaskData:
    return TaskData(*load_digits(), None)


def _text(folder: Path, options: DataOptions) -> TaskData:
    splits, vocab_size = load_text(folder)
    return TaskData(*splits, vocab_size)


def _retrieval(folder: Path, options: DataOptions) -> TaskData:
    splits, vocab_size = load_retrieval(folder)
    return TaskData(*splits, vocab_size)


def _image(folder: Path, options: DataOptions) -> TaskData:
    return TaskData(*load_image(folder), None)


TASKS: dict[str, Task] = {
    "listops": _listops("listops", listops.Lengths(), (96_000, 2000, 2000), 1000),
    "text": Task("Text", 2, TEXT_LENGTH, _text, selection="test"),
    "retrieval": Task("Retrieval", 2, RETRIEVAL_LENGTH, _retrieval, sequences=2),
    "image": Task("Image", 10, 1024, _image, pixels=Pixels(122.6 / 255, 61 / 255)),
    "pathfinder32": _pathfinder(32, 1000),
    "pathfinder128": _pathfinder(128, 250),
    "pathfinder64": _pathfinder(64, None),
    "pathfinder256": _pathfinder(256, None),
    "listops-256": _listops("listops-256", listops.Lengths(100, 256), (16_000, 1000, 2000), 1000),
    "digits": Task("digits", 10, 64, _digits, pixels=Pixels(0.3, 0.37)),
}
