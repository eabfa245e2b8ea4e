"""Accuracy over labelled positions. Counts are added up over batches; a mean of nothing is an error, not a zero."""

from __future__ import annotations

import numpy as np

from seqmodels.tasks.recall.examples import NO_TARGET


class Score:
    """Counts of right answers by example and by class, over any number of batches.

    Args:
        classes: ids that targets and predictions may have.

    The prediction at a position is the id of the largest logit; of equal ones the smallest id
    (``argmax`` of NumPy and PyTorch), so that constant logits score what id 0 scores.
    """

    def __init__(self, classes: int) -> None:
        self.right = np.zeros(classes, np.int64)
        self.asked = np.zeros(classes, np.int64)
        self.predicted = np.zeros(classes, np.int64)
        self.examples = 0
        self.example_sum = 0.0

    def add(self, predictions: np.ndarray, targets: np.ndarray) -> None:
        """One batch: ids (count, length) each; positions whose target is -100 do not count."""
        if predictions.shape != targets.shape or targets.ndim != 2:
            raise ValueError(
                f"predictions are {predictions.shape}, targets {targets.shape}; expected (count, length) both"
            )
        scored = targets != NO_TARGET
        size = len(self.asked)
        for name, ids in (("target", targets[scored]), ("prediction", predictions[scored])):
            if ids.size and (ids.min() < 0 or ids.max() >= size):
                raise ValueError(f"a {name} is {ids.min()} to {ids.max()}; expected ids of [0, {size})")
        hit = scored & (predictions == targets)
        self.right += np.bincount(targets[hit], minlength=size)
        self.asked += np.bincount(targets[scored], minlength=size)
        self.predicted += np.bincount(predictions[scored], minlength=size)
        labels = scored.sum(1)
        has = labels > 0
        self.examples += int(has.sum())
        self.example_sum += float((hit.sum(1)[has] / labels[has]).sum())

    def accuracy(self) -> float:
        """Right answers over answers."""
        return float(self.right.sum() / self._total())

    def accuracy_by_example(self) -> float:
        """The mean over examples of each one's accuracy; examples without a label do not count."""
        self._total()
        return self.example_sum / self.examples

    def macro_accuracy(self, *, count_predicted: bool = True) -> float:
        """The mean over classes of each one's accuracy (MAD's metric).

        Args:
            count_predicted: a class that no target has but some prediction names counts as 0, as in MAD's
                code (torchmetrics); False leaves it out.
        """
        self._total()
        present = (self.asked > 0) | (self.predicted > 0) if count_predicted else self.asked > 0
        return float((self.right[present] / np.maximum(self.asked[present], 1)).mean())

    def _total(self) -> int:
        total = int(self.asked.sum())
        if total == 0:
            raise ValueError("no labelled position was scored: every target is -100 or there is no example")
        return total
