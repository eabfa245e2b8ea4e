"""Data sets as tensors that stay on the device: tokens, and for each row the labelled positions and their answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evals.recall.suites import TUNING_SEED, Cell, DataSet
from seqmodels.tasks.recall.examples import NO_TARGET, Examples
from seqmodels.tasks.recall.registry import Split, generate, task_named

TRAIN, TEST = 0, 1  # streams: no set depends on another's size
TEST_SEED = 1_000_003  # of every test set, whatever the cell's seed; plus 1 where learning rates are chosen


class Resident(NamedTuple):
    """One data set on the device.

    Attributes:
        tokens: (count, length) int32.
        positions: (count, labels) int64; rows with fewer labels repeat position 0.
        answers: (count, labels) int64, -100 where a row has no more.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor

    def rows(self, index: Tensor | slice) -> Resident:
        return Resident(self.tokens[index], self.positions[index], self.answers[index])

    def __len__(self) -> int:  # type: ignore[override]
        return self.tokens.shape[0]


def resident(examples: Examples, device: str) -> Resident:
    """To tensors: logits are needed at labelled positions only, so those are looked up once, here."""
    labelled = examples.targets != NO_TARGET
    labels = max(1, int(labelled.sum(1).max()))
    # Labelled columns first, in their order.
    positions = np.argsort(~labelled, axis=1, kind="stable")[:, :labels]
    answers = np.take_along_axis(examples.targets, positions, 1).astype(np.int64)
    positions[answers == NO_TARGET] = 0
    return Resident(*(torch.from_numpy(array).to(device) for array in (examples.tokens, positions, answers)))


def make(cell: Cell, data: DataSet, split: Split, stream: tuple[int, ...]) -> Examples:
    """The examples of one data set of ``cell``, as its model reads them."""
    seed = TEST_SEED + (cell.seed >= TUNING_SEED) if split == "test" else cell.seed
    examples = generate(cell.task, data.count, data.settings, seed=seed, stream=stream, split=split)
    return twice(examples, cell.arm) if cell.reads == "twice" else examples


def twice(examples: Examples, arm: str) -> Examples:
    """Every row behind a copy of itself, asked at its last token (JRT-Prompt, arXiv:2407.05483).

    Raises:
        ValueError: labels before the last token, which the copy could give away.
    """
    check_last(examples, f"{arm} reads twice")
    nothing = np.full_like(examples.targets, NO_TARGET)
    return Examples(np.concatenate((examples.tokens,) * 2, 1), np.concatenate((nothing, examples.targets), 1))


def check_last(examples: Examples, what: str) -> None:
    """``ValueError`` where a label stands before the last token; ``what`` says why none may."""
    if (examples.targets[:, :-1] != NO_TARGET).any():
        raise ValueError(f"{what}, so a task may ask at the last token of a row alone; this one asks earlier")


def labels_of(data: tuple[DataSet, ...], task: str) -> list[str]:
    """A name for each data set: the settings in which they differ."""
    found = [task_named(task).settings(item.settings) for item in data]
    differing = [name for name in found[0] if len({str(one[name]) for one in found}) > 1]
    return [",".join(f"{name}={one[name]}" for name in differing) or "test" for one in found]
