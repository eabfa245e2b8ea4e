"""Recall tasks by name, for suites that read their protocol from a file."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from seqmodels.configuration import nearest
from seqmodels.tasks.recall.examples import Examples

Metric = Literal["accuracy", "macro_accuracy"]
Split = Literal["train", "test"]


class Task(NamedTuple):
    """A generator and how its answers are scored.

    Attributes:
        path: ``module:function``; the function takes ``count`` and keywords and returns :class:`Examples`.
        metric: of :class:`seqmodels.tasks.recall.metrics.Score`.
        readout: where answers are read: at each labelled position, or from the last hidden vector and the
            position (MAD's compression).
        has_split: training and test examples differ (``split`` is passed on).
    """

    path: str
    metric: Metric = "accuracy"
    readout: Literal["token", "last"] = "token"
    has_split: bool = False

    def function(self) -> Callable[..., Examples]:
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, defaults included; unknown names are refused with the nearest known ones."""
        parameters = inspect.signature(self.function()).parameters.values()
        known = {p.name: p.default for p in parameters if p.name not in ("count", "seed", "stream", "split")}
        for name in given:
            if name not in known:
                raise ValueError(
                    f"{self.path.partition(':')[2]}: unknown setting {name!r}.{nearest(name, known)} "
                    f"Known: {', '.join(known)}"
                )
        found = {name: given.get(name, default) for name, default in known.items()}
        missing = [name for name, value in found.items() if value is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"{self.path.partition(':')[2]}: setting {', '.join(missing)} is missing")
        return found


_PACKAGE = "seqmodels.tasks.recall"
TASKS: dict[str, Task] = {
    "mqar": Task(f"{_PACKAGE}.mqar:mqar"),
    "induction_heads": Task(f"{_PACKAGE}.induction:induction_heads"),
    "toy_induction": Task(f"{_PACKAGE}.induction:toy_induction"),
    "selective_copying": Task(f"{_PACKAGE}.selective_copying:selective_copying"),
    "in_context_recall": Task(f"{_PACKAGE}.mad:in_context_recall", "macro_accuracy", has_split=True),
    "noisy_recall": Task(f"{_PACKAGE}.mad:noisy_recall", "macro_accuracy", has_split=True),
    "fuzzy_recall": Task(f"{_PACKAGE}.mad_fuzzy:fuzzy_recall", "macro_accuracy", has_split=True),
    "mad_selective_copying": Task(f"{_PACKAGE}.mad:mad_selective_copying", "macro_accuracy"),
    "compression": Task(f"{_PACKAGE}.mad:compression", "macro_accuracy", readout="last"),
    "memorization": Task(f"{_PACKAGE}.mad:memorization", "macro_accuracy"),
    "set_disjointness": Task("seqmodels.tasks.set_disjointness:set_disjointness"),
    "word_problem": Task(f"{_PACKAGE}.word_problems:word_problem", has_split=True),
}


def task_named(name: str) -> Task:
    """The task; ``ValueError`` with the nearest names when there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}.{nearest(name, TASKS)} Known: {', '.join(TASKS)}")
    return TASKS[name]


def generate(
    name: str,
    count: int,
    settings: Mapping[str, Any],
    *,
    seed: int,
    stream: tuple[int, ...] = (),
    split: Split = "train",
) -> Examples:
    """``count`` examples of task ``name``.

    Raises:
        ValueError: an unknown task or setting, and what the generator refuses.
    """
    task = task_named(name)
    options: dict[str, Any] = {**task.settings(settings), "seed": seed, "stream": stream}
    if task.has_split:
        options["split"] = split
    return task.function()(count, **options)


def row_length(name: str, settings: Mapping[str, Any]) -> int:
    """Tokens of a row."""
    return _row_length(name, tuple(sorted(settings.items())))


@functools.cache
def _row_length(name: str, settings: tuple[tuple[str, Any], ...]) -> int:
    return generate(name, 1, dict(settings), seed=0).tokens.shape[1]


def vocab_size(name: str, settings: Mapping[str, Any]) -> int:
    """Token ids that examples of these settings may hold; targets are among them."""
    task = task_named(name)
    own = getattr(importlib.import_module(task.path.partition(":")[0]), "vocab_size", None)
    found = task.settings(settings)
    return found["vocab_size"] if own is None else own(**found)
