"""The laws by name. Each takes a layer and raises :class:`~seqmodels.testing.LawViolation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seqmodels.testing.agreement import backend_agreement
from seqmodels.testing.bookkeeping import accounting, round_trip
from seqmodels.testing.exactness import packing, split
from seqmodels.testing.locality import batch, causality
from seqmodels.testing.registration import registration

LAWS: dict[str, Callable[..., Any]] = {
    "split": split,
    "packing": packing,
    "causality": causality,
    "batch": batch,
    "backend_agreement": backend_agreement,
    "registration": registration,
    "round_trip": round_trip,
    "accounting": accounting,
}

__all__ = [
    "LAWS",
    "accounting",
    "backend_agreement",
    "batch",
    "causality",
    "packing",
    "registration",
    "round_trip",
    "split",
]
