"""What fills a shard, by task: plain settings and a shard's number to examples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from seqmodels.tasks.lra import listops, pathfinder
from seqmodels.tasks.lra.draws import Draws
from seqmodels.tasks.lra.examples import Examples, gather

_LISTOPS, _PATHFINDER = 1, 2  # streams of the random numbers


def make_listops(settings: dict[str, Any], shard: int, count: int, refused: Collection[bytes] = ()) -> Examples:
    lengths = listops.Lengths(settings["above"], settings["below"])
    return listops.generate(count, lengths, Draws(settings["seed"], _LISTOPS, shard), refused)


def make_pathfinder(settings: dict[str, Any], shard: int, count: int, refused: Collection[bytes] = ()) -> Examples:
    """``refused`` is not looked at: the original refuses no repeated picture either."""
    side = settings["side"]
    draws = Draws(settings["seed"], _PATHFINDER, side, shard)
    pictures = [pathfinder.generate(pathfinder.SETTINGS[side], draws) for _ in range(count)]
    return gather([picture.pixels.reshape(-1) for picture in pictures], np.array([p.label for p in pictures]))
