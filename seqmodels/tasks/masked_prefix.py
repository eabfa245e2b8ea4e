"""Which tokens of a prefix are masked: a function of the seed and the row's number alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seqmodels.tasks.shuffle import raw_draws


def masked_positions(
    first_row: int, rows: int, length: int, probability: float, *, seed: int, stream: tuple[int, ...] = ()
) -> Tensor:
    """(rows, length) bool, each True with ``probability``, independently.

    Row ``r`` of the endless sequence of rows has the same positions in whatever batch, on whatever
    process and after however many restarts it is read.
    """
    threshold = np.uint64(min(round(probability * 2.0**64), 2**64 - 1))
    draws = [raw_draws(seed, *stream, row, count=length) for row in range(first_row, first_row + rows)]
    return torch.from_numpy(np.stack(draws) < threshold)
