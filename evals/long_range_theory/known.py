"""A measured value beside the known one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One measurement.

    Attributes:
        case: topic and what was measured, such as ``kernels/lin zoh``.
        metric: name of the number.
        value: the number.
        known: what it must be, as text with all its digits (``".6052491230"``); "" for a number without one.
        relative: tolerance relative to the known value; None: the known digits, to one unit of the last.
        below: ``known`` is an upper bound.
        config: of the row: sizes, and under ``curve`` what figures draw.
    """

    case: str
    metric: str
    value: float
    known: str = ""
    relative: float | None = None
    below: bool = False
    config: Mapping[str, Any] = {}

    @property
    def tolerance(self) -> float:
        """Absolute."""
        if self.relative is not None:
            return self.relative * abs(float(self.known))
        mantissa, _, exponent = self.known.partition("e")
        digits = len(mantissa.partition(".")[2])
        return 10.0 ** (int(exponent or 0) - digits)

    @property
    def holds(self) -> bool:
        if not self.known:
            return True
        if self.below:
            return self.value < float(self.known)
        return math.isfinite(self.value) and abs(self.value - float(self.known)) <= self.tolerance * (1 + 1e-9)
