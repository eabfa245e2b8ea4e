"""The laws every layer obeys, as functions to test a layer of your own with.

>>> from seqmodels.mixers.base import Mixer
from seqmodels.testing import check_layer
>>> check_layer(MyLayer, d_model=16, num_heads=2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from seqmodels.mixers.base import Mixer
from seqmodels.testing import laws
from seqmodels.testing.laws import LAWS
from seqmodels.testing.subject import poisoned
from seqmodels.testing.violation import LawViolation

__all__ = ["LAWS", "LawViolation", "check_law", "check_layer", "laws", "poisoned"]


def check_law(name: str, factory: Callable[..., Mixer], **config: Any) -> Any:
    """Builds ``factory(**config)`` and holds it to one law."""
    if name not in LAWS:
        raise ValueError(f"unknown law {name!r}; expected one of {', '.join(LAWS)}")
    with poisoned():
        layer = factory(**config)
    if name == "round_trip":
        return laws.round_trip(layer, factory, config)
    return LAWS[name](layer)


def check_layer(
    factory: Callable[..., Mixer], *, only: Sequence[str] | None = None, d_model: int = 16, **sizes: Any
) -> None:
    """Holds ``factory(d_model=..., **sizes)`` to every law (or those in ``only``).

    Use small sizes: the laws run the layer some hundred times, in float64, and compile it twice.

    Raises:
        LawViolation: naming every law that is broken and how. ``law`` holds their names, comma separated.
    """
    broken = []
    for name in LAWS if only is None else only:
        try:
            check_law(name, factory, d_model=d_model, **sizes)
        except LawViolation as violation:
            broken.append(violation)
    if len(broken) == 1:
        raise broken[0]
    if broken:
        listing = "\n".join(f"- {violation}" for violation in broken)
        names = ", ".join(violation.law for violation in broken)
        raise LawViolation(names, f"{len(broken)} laws are broken:\n{listing}") from broken[0]
