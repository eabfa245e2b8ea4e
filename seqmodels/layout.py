"""Where documents lie in a (batch, length) grid of tokens.

A document is a run of tokens inside one row. Three uses share this one description:

* packed training rows: several documents behind one another,
* left-padded prompts: one document a row, ending at the last column,
* prefix layers: a prefix length for each document.

Tokens outside every document are padding: they change no state and no gradient, and the
layers' outputs there are zero or finite garbage that nothing may read. Everything is a
tensor of fixed capacity, made once on the host, so that a new batch recompiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Documents in a batch. Make one with :meth:`packed`, :meth:`left_padded` or :meth:`full`.

    Attributes:
        starts: (documents,) int64, ``row * length + column`` of each first token, ascending;
            ``batch * length`` for unused slots.
        lengths: (documents,) int64, number of tokens; 0 for unused slots.
        document: (batch, length) int64, slot of each token's document, -1 for padding.
        position: (batch, length) int64, index of each token inside its document, 0 for padding.
        prefix_lengths: (documents,) int64 or None, tokens of each document that a prefix layer
            reads in both directions, counted from the document's first token.
        compat_mask: (batch, length) bool or None, padding that released JRT checkpoints read: a token
            like any other to every layer, whose key prefix linear attention takes for zero.
    """

    starts: Tensor
    lengths: Tensor
    document: Tensor
    position: Tensor
    prefix_lengths: Tensor | None = None
    compat_mask: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.document.shape[0]

    @property
    def length(self) -> int:
        return self.document.shape[1]

    @property
    def num_documents(self) -> int:
        """Capacity: rows of a state that goes with this layout."""
        return self.starts.shape[0]

    @property
    def valid(self) -> Tensor:
        """(batch, length) bool, False on padding."""
        return self.document >= 0

    @classmethod
    def packed(
        cls,
        lengths: Sequence[Sequence[int]],
        length: int | None = None,
        *,
        capacity: int | None = None,
        prefix_lengths: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Layout:
        """Row ``b`` holds documents of ``lengths[b]`` tokens from column 0 on; what is left is padding.

        Args:
            lengths: document lengths (each at least 1) for each row.
            length: columns of the grid; the fullest row's total when omitted.
            capacity: document slots; as many as there are documents when omitted. Keep it
                constant over batches to avoid recompilation.
            prefix_lengths: one entry a document, in reading order.
        """
        longest = max((sum(row) for row in lengths), default=0)
        length = longest if length is None else length
        for row, entries in enumerate(lengths):
            if any(entry < 1 for entry in entries):
                raise ValueError(f"document lengths must be at least 1; row {row} has {list(entries)}")
            if sum(entries) > length:
                raise ValueError(
                    f"row {row} holds {sum(entries)} tokens in {len(entries)} documents but the grid has "
                    f"{length} columns; raise length or move documents to another row"
                )
        spans = []
        for row, entries in enumerate(lengths):
            column = 0
            for entry in entries:
                spans.append((row, column, entry))
                column += entry
        return cls._from_spans(spans, len(lengths), length, capacity, prefix_lengths, device)

    @classmethod
    def left_padded(
        cls,
        lengths: Sequence[int],
        length: int | None = None,
        *,
        prefix_lengths: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Layout:
        """One document a row that ends at the last column: a batch of prompts of unequal length."""
        length = max(lengths, default=0) if length is None else length
        for row, entry in enumerate(lengths):
            if not 1 <= entry <= length:
                raise ValueError(f"row {row} has {entry} tokens; expected 1 to {length}")
        spans = [(row, length - entry, entry) for row, entry in enumerate(lengths)]
        return cls._from_spans(spans, len(lengths), length, None, prefix_lengths, device)

    @classmethod
    def full(
        cls,
        batch_size: int,
        length: int,
        *,
        prefix_lengths: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Layout:
        """One document a row without padding: what ``layout=None`` means, plus prefix lengths.

        Computed on the device: it may be called inside compiled code.
        """
        row = torch.arange(batch_size, device=device)
        column = torch.arange(length, device=device)
        prefix = (
            None if prefix_lengths is None else _prefix_tensor(prefix_lengths, batch_size, batch_size).to(row.device)
        )
        return cls(
            row * length,
            torch.full_like(row, length),
            row[:, None].expand(batch_size, length).contiguous(),
            column.expand(batch_size, length).contiguous(),
            prefix,
        )

    @classmethod
    def _from_spans(
        cls,
        spans: list[tuple[int, int, int]],
        batch_size: int,
        length: int,
        capacity: int | None,
        prefix_lengths: Sequence[int] | None,
        device: torch.device | str | None,
    ) -> Layout:
        capacity = len(spans) if capacity is None else capacity
        if len(spans) > capacity:
            raise ValueError(f"{len(spans)} documents do not fit capacity={capacity}; raise capacity")
        starts = torch.full((capacity,), batch_size * length, dtype=torch.int64)
        sizes = torch.zeros(capacity, dtype=torch.int64)
        document = torch.full((batch_size, length), -1, dtype=torch.int64)
        position = torch.zeros((batch_size, length), dtype=torch.int64)
        for slot, (row, column, entry) in enumerate(spans):
            starts[slot] = row * length + column
            sizes[slot] = entry
            document[row, column : column + entry] = slot
            position[row, column : column + entry] = torch.arange(entry)
        prefix = None if prefix_lengths is None else _prefix_tensor(prefix_lengths, len(spans), capacity)
        layout = cls(starts, sizes, document, position, prefix)
        return layout if device is None else layout.to(device)

    def with_prefix(self, prefix_lengths: Tensor) -> Layout:
        """The same documents with (documents,) prefix lengths; below 0 counts as 0."""
        if prefix_lengths.shape != self.lengths.shape:
            raise ValueError(
                f"prefix_lengths is {tuple(prefix_lengths.shape)}; expected {tuple(self.lengths.shape)}, "
                "one for each document slot"
            )
        return replace(self, prefix_lengths=prefix_lengths)

    def with_compat_mask(self, compat_mask: Tensor) -> Layout:
        """The same documents with a (batch, length) bool mask of padding that is read (:attr:`compat_mask`)."""
        if compat_mask.shape != self.document.shape:
            raise ValueError(
                f"compat_mask is {tuple(compat_mask.shape)}; expected {tuple(self.document.shape)} (batch, length)"
            )
        return replace(self, compat_mask=compat_mask)

    def prefixes(self) -> Layout:
        """The documents cut to their prefixes (all of a document that is shorter than its prefix)."""
        if self.prefix_lengths is None:
            raise ValueError("the layout has no prefix_lengths; make it with them, or call with_prefix")
        return replace(self, lengths=torch.minimum(self.lengths, self.prefix_lengths).clamp(min=0), prefix_lengths=None)

    def to(self, device: torch.device | str) -> Layout:
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), self)

    def last_token(self) -> Tensor:
        """(documents,) flat index of each document's last token; 0 for unused slots."""
        return torch.where(self.lengths > 0, self.starts + self.lengths - 1, torch.zeros_like(self.starts))


def _prefix_tensor(prefix_lengths: Sequence[int], documents: int, capacity: int) -> Tensor:
    if len(prefix_lengths) != documents:
        raise ValueError(f"{len(prefix_lengths)} prefix lengths for {documents} documents; expected one each")
    if any(entry < 0 for entry in prefix_lengths):
        raise ValueError(f"prefix lengths must not be negative; got {list(prefix_lengths)}")
    prefix = torch.zeros(capacity, dtype=torch.int64)
    prefix[:documents] = torch.tensor(list(prefix_lengths), dtype=torch.int64)
    return prefix


pytree.register_pytree_node(
    Layout,
    lambda layout: (
        [
            layout.starts,
            layout.lengths,
            layout.document,
            layout.position,
            layout.prefix_lengths,
            layout.compat_mask,
        ],
        None,
    ),
    lambda children, _: Layout(*children),
)
