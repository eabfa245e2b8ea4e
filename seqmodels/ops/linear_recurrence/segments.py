"""How a GPU cuts time: segments that run at once, where rows and channels alone do not fill the device."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.tiles import device_properties

_SHORTEST = 256  # tokens of a segment: below, its programs do little but start
_PROGRAMS = 4  # of a multiprocessor, that hide each other's waiting


def plan(x: Tensor, programs: int) -> tuple[int, int]:
    """(tokens of a segment, segments) for rows and channels that make ``programs`` programs.

    As many as fill the device, in a power of two of tokens: lengths that are alike share one plan.
    """
    length = x.shape[1]
    wanted = _PROGRAMS * device_properties(x.device.index).multiprocessors // programs
    if wanted < 2 or length < 2 * _SHORTEST:
        return length, 1
    shortest = -(-length // wanted)
    segment = max(_SHORTEST, 1 << (shortest - 1).bit_length())
    return segment, -(-length // segment)
