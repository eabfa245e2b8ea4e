"""Documents as streams: segments that run at once, and the states in front of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqmodels.ops.diagonal_ssm.tables import MODES, grouped
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.tiles import device_properties

_TOGETHER = 16  # streams of a program
_HEADS = 4  # of a program
_PROGRAMS = 2  # of a multiprocessor, whose registers hold no more
_SHORTEST = 128  # tokens of a segment: below, a program does little but load its matrices


@dataclass(frozen=True)
class Streams:
    """``segments`` of ``segment`` tokens (a multiple of a chunk) for each of ``documents``."""

    documents: int
    segments: int
    segment: int
    length: int
    starts: Tensor | None
    lengths: Tensor | None

    @property
    def count(self) -> int:
        return self.documents * self.segments

    def last(self, ends: Tensor) -> Tensor:
        """(documents, ...): behind each document, from (documents, segments, ...) behind each segment."""
        if self.segments == 1:
            return ends[:, 0]
        if self.lengths is None:
            return ends[:, (self.length - 1) // self.segment]
        index = ((self.lengths - 1) // self.segment).clamp_min(0)
        return ends[torch.arange(self.documents, device=ends.device), index]

    def before(self, z: Tensor, ends: Tensor, opening: Tensor | None) -> Tensor:
        """The state in front of every segment, from what each leaves of nothing; as (documents, segments, heads,
        groups, 2, 16), opening (documents, heads, groups, 2, 16)."""
        behind, _ = linear_recurrence(
            self._decay(z), _channels(ends, 2), initial_state=None if opening is None else _channels(opening, 1)
        )
        shape = (self.documents, self.segments, *ends.shape[2:4], MODES, 2)
        return self.shifted(behind.view(shape).transpose(-1, -2), opening)

    def shifted(self, behind: Tensor, opening: Tensor | None) -> Tensor:
        first = torch.zeros_like(behind[:, :1]) if opening is None else opening[:, None]
        return torch.cat((first, behind[:, :-1]), 1).contiguous()

    def _decay(self, z: Tensor) -> Tensor:
        return torch.view_as_real(torch.exp(self.segment * grouped(z))).float().flatten(0, 2)


def _channels(states: Tensor, first: int) -> Tensor:
    """(..., heads, groups, 2, 16) as (..., channels, 2)."""
    return states.transpose(-1, -2).flatten(first, first + 2)


def plan(u: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Streams:
    """As many streams as fill the device, and at least one program's; segments in powers of two of tokens."""
    length = u.shape[1]
    documents = u.shape[0] if starts is None else starts.shape[0]
    programs = _PROGRAMS * device_properties(u.device.index).multiprocessors
    blocks = -(-u.shape[2] // _HEADS)
    wanted = _TOGETHER * -(-programs // blocks)
    cuts = wanted // documents
    if cuts < 2 or length < 2 * _SHORTEST:
        return Streams(documents, 1, -(-length // 16) * 16, length, starts, lengths)
    segment = max(_SHORTEST, 1 << (-(-length // cuts) - 1).bit_length())  # the next power of two
    return Streams(documents, -(-length // segment), segment, length, starts, lengths)
