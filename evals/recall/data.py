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
    """The examples of one data set of ``cell``."""
    seed = TEST_SEED + (cell.seed >= TUNING_SEED) if split == "test" else cell.seed
    return generate(cell.task, data.count, data.settings, seed=seed, stream=stream, split=split)


def labels_of(data: tuple[DataSet, ...], task: str) -> list[str]:
    """A name for each data set: the settings in which they differ."""
    found = [task_named(task).settings(item.settings) for item in data]
    differing = [name for name in found[0] if len({str(one[name]) for one in found}) > 1]
    return [",".join(f"{name}={one[name]}" for name in differing) or "test" for one in found]
