"""What a converted model's attention modules share while a forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.mixers.attention_core import AttentionCore


class AttentionCall(NamedTuple):
    """One layer's attention.

    Attributes:
        q: (batch, length, heads, width), after position embedding.
        k, v: (batch, length, key heads, width).
        scaling: of q . k under the softmax.
        key_mask: (batch, length) bool, True on tokens that count; None when all do.
        causal: False for encoders.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    key_mask: Tensor | None
    causal: bool

    def row(self, index: int) -> AttentionCall:
        """One sequence of the batch."""
        one = slice(index, index + 1)
        mask = None if self.key_mask is None else self.key_mask[one]
        return self._replace(q=self.q[one], k=self.k[one], v=self.v[one], key_mask=mask)

    def layout(self) -> Layout | None:
        """The tokens that count as one document a row."""
        return None if self.key_mask is None else padded_layout(self.key_mask)


def padded_layout(mask: Tensor) -> Layout:
    """One document a row: the run of True in each row of ``mask`` (batch, length)."""
    batch, length = mask.shape
    row = torch.arange(batch, device=mask.device)
    lengths = mask.sum(dim=1)
    first = mask.to(torch.int8).argmax(dim=1)  # the first True
    position = (torch.arange(length, device=mask.device) - first[:, None]).where(mask, 0)
    return Layout(row * length + first, lengths, row[:, None].where(mask, -1), position)


Observer = Callable[[int, AttentionCore, AttentionCall, Tensor], None]


@dataclass
class Runtime:
    """Switches of one model.

    Attributes:
        observer: when set, every layer passes on the teacher's softmax attention and calls
            ``observer(layer, core, call, teacher_output)``.
        return_weights: return attention weights, by the quadratic form.
    """

    observer: Observer | None = None
    return_weights: bool = False

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """The teacher's attention in every layer, shown to ``observer``."""
        self.observer = observer
        try:
            yield
        finally:
            self.observer = None
