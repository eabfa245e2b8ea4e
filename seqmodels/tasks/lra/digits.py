"""scikit-learn's handwritten digits, pixel by pixel: real data that come with a package."""

from __future__ import annotations

import numpy as np

from seqmodels.tasks.lra.examples import Examples
from seqmodels.tasks.shuffle import permutation

SEED = 42
LENGTH = 64  # 8 x 8
VALIDATION, TEST = 180, 360  # of 1797; the rest is for training


def load_digits() -> tuple[Examples, Examples, Examples]:
    """Training, validation and test examples: 64 pixels in row-major order, 0 to 16 scaled to 0 to 255."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ModuleNotFoundError(
            "the task 'digits' reads scikit-learn's data: pip install scikit-learn (the extra 'eval')"
        ) from error
    values, targets = (np.asarray(part) for part in load(return_X_y=True))
    images = np.rint(values * (255 / 16)).astype(np.uint8)
    labels = targets.astype(np.int64)
    order = permutation(SEED, count=len(labels))
    parts = np.split(order, [len(order) - VALIDATION - TEST, len(order) - TEST])
    found = []
    for part in parts:
        offsets = np.arange(len(part) + 1, dtype=np.int64) * LENGTH
        found.append(Examples(images[part].reshape(-1), offsets, labels[part]))
    return found[0], found[1], found[2]
