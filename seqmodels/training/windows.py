"""Rows cut into windows that go on from one another: truncated back-propagation through time.

A document that crosses the edge between two windows takes its state along; one that begins in a window
begins afresh. With packed documents a state has one row per document, so what is handed on is a row for each row of
the batch: that of its last document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.models.stack import ModelState
from seqmodels.tasks.text import TextBatch


class Windows(NamedTuple):
    """How the documents of each window lie and go on; all tensors on the batch's device.

    Attributes:
        layouts: of each window.
        sources: of each window (documents,) int64: the row of the batch whose state a document goes on from;
            the number of rows for a document that begins here.
        ends: of each window (rows,) int64: the slot of each row's last document.
        state: a row for each row of the batch, from the step before; None: every document is at its beginning.
    """

    layouts: tuple[Layout, ...]
    sources: tuple[Tensor, ...]
    ends: tuple[Tensor, ...]
    state: ModelState | None = None

    def to(self, device: torch.device) -> Windows:
        return Windows(
            tuple(layout.to(device) for layout in self.layouts),
            tuple(source.to(device, non_blocking=True) for source in self.sources),
            tuple(end.to(device, non_blocking=True) for end in self.ends),
            self.state,
        )


def cut_windows(
    batch: TextBatch, windows: int, *, state: ModelState | None = None, capacity: int | None = None
) -> Windows:
    """The windows of a batch of full rows.

    Args:
        batch: rows of ``windows`` windows each.
        state: what the rows go on from; None where they begin.
        capacity: documents of a window's layout; as many as there are when omitted.
    """
    rows, length = batch.tokens.shape[0], batch.tokens.shape[1] // windows
    cut = [_cut(lengths, length) for lengths in batch.lengths]
    layouts, sources, ends = [], [], []
    for window in range(windows):
        lengths = [pieces[window][0] for pieces in cut]
        going_on = [pieces[window][1] for pieces in cut]
        if window == 0:
            going_on = list(batch.inside) if state is not None else [False] * rows
        layout = Layout.packed(lengths, length, capacity=capacity)
        source = torch.full_like(layout.starts, rows)
        end, slot = [], 0
        for row, documents in enumerate(lengths):
            if going_on[row]:
                source[slot] = row
            slot += len(documents)
            end.append(slot - 1)
        layouts.append(layout)
        sources.append(source)
        ends.append(torch.tensor(end))
    return Windows(tuple(layouts), tuple(sources), tuple(ends), state)


def _cut(lengths: list[int], size: int) -> list[tuple[list[int], bool]]:
    """Of each window of ``size`` tokens: its documents' lengths, and whether the first began in the one before."""
    windows: list[tuple[list[int], bool]] = [([], False)]
    room = size
    for count in lengths:
        if room == 0:
            windows.append(([], False))
            room = size
        while count > room:
            windows[-1][0].append(room)
            count -= room
            windows.append(([], True))
            room = size
        windows[-1][0].append(count)
        room -= count
    return windows


def begin_window(carried: ModelState | None, fresh: ModelState, source: Tensor) -> ModelState:
    """A state row for each document: that of ``carried`` it goes on from, or ``fresh``, one row before any token."""
    if carried is None:
        return fresh.select(torch.zeros_like(source))
    return pytree.tree_map(_joined, carried, fresh).select(source)


def _joined(carried: Tensor | None, fresh: Tensor | None) -> Tensor | None:
    """Rows of both; a field may be None in a state."""
    return None if carried is None or fresh is None else torch.cat([carried.to(fresh.dtype), fresh])
