"""How published results divide the data: PyTorch's permutation of a seed, from its definition."""

from __future__ import annotations

from typing import Literal

import numpy as np

SEED = 42

PathfinderSplit = Literal["s4", "lra"]


def torch_permutation(seed: int, count: int) -> np.ndarray:
    """(count,) int64: ``torch.randperm(count)`` of a CPU generator with that seed, whatever PyTorch does later.

    Fisher and Yates' shuffle from the front, by the 32-bit Mersenne Twister modulo what is left. numpy
    promises that ``RandomState`` keeps its stream.
    """
    draws = np.random.RandomState(seed).randint(0, 1 << 32, size=max(count - 1, 0), dtype=np.uint32)
    jumps = (draws.astype(np.int64) % np.arange(count, 1, -1)).tolist()
    order = list(range(count))
    for at, jump in enumerate(jumps):
        order[at], order[at + jump] = order[at + jump], order[at]
    return np.array(order, dtype=np.int64)


def pathfinder_parts(count: int, split: PathfinderSplit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of training, validation and test: 80, 10 and 10 %.

    ``s4``: a permutation of the seed 42, as in S4's and S5's code. ``lra``: in the order of the files, as in
    Long Range Arena's own.
    """
    order = torch_permutation(SEED, count) if split == "s4" else np.arange(count)
    tenth = count // 10
    train, validation, test = np.split(order, [count - 2 * tenth, count - tenth])
    return train, validation, test
