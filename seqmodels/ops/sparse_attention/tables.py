"""The tables of :class:`~seqmodels.ops.sparse_attention.selection.BlockTables`, without a read on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.ops.documents import AlignedBlocks, aligned_blocks


class _Lists(NamedTuple):
    """Sorted candidates: (T, n) each."""

    score: Tensor
    source: Tensor
    position: Tensor


def forward(
    scores: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    carried_position: Tensor | None,
    recent_score: Tensor | None,
    global_score: Tensor | None,
    global_position: Tensor | None,
    window: int,
    num_globals: int,
    block: int,
) -> tuple[Tensor, ...]:
    batch_size, length = scores.shape
    device, tokens = scores.device, scores.numel()
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=device) * length
        lengths = torch.full_like(starts, length)
    documents = starts.shape[0]
    seen = torch.zeros_like(starts) if carried_position is None else carried_position
    blocks = aligned_blocks(starts, lengths, seen, batch_size, length, block)
    document, position = blocks.document, blocks.position
    ring = tokens + documents * window  # where globals begin in the universe

    def source_of(place: Tensor, allowed: Tensor) -> Tensor:
        """The universe's row of each position (T, n) of the block's document; -1 where it is not there."""
        before, first = seen[document][:, None], starts[document][:, None]
        new = place - before
        in_ring = (place >= 0) & (new < 0) & (new >= -window)
        fresh = (new >= 0) & (new < lengths[document][:, None])
        found = torch.where(fresh, first + new, tokens + document[:, None] * window + place % window)
        return torch.where(allowed & (fresh | in_ring), found, -1)

    first_place = position[:, :1]  # every used block has its first slot
    reach = first_place + torch.arange(1 - window, block, device=device)
    local_source = source_of(reach, blocks.used[:, None])

    if num_globals == 0:
        none = starts.new_zeros(blocks.token.shape[0], 0)
        final = starts.new_zeros(documents, 0)
        # The outputs of an op share no memory.
        return blocks.token, position, local_source, none, none.clone(), final, final.clone()
    own = _own_lists(scores, recent_score, seen, blocks, source_of, num_globals)
    if global_score is None or global_position is None:
        worst = scores.new_full((documents, num_globals), float("-inf"))
        nobody = starts.new_full(worst.shape, -1)
        start = _Lists(worst, nobody, nobody)
    else:
        slots = torch.arange(documents * num_globals, device=device).view(documents, num_globals)
        empty = global_position < 0
        start = _Lists(
            global_score.to(scores.dtype).masked_fill(empty, float("-inf")),
            (ring + slots).masked_fill(empty, -1),
            global_position,
        )
    # A document stays in its row: that bounds its blocks, and so the rounds of the scan.
    through = _scan(own, start, blocks.first, document, num_globals, length // block + 2)
    before = _rows(through, torch.arange(-1, own.score.shape[0] - 1, device=device).clamp_min(0))
    before = _choose(blocks.first, _rows(start, document), before)
    # The final lists: behind the last whole block, or the lists in front of a document's only, open block.
    open_end = (seen + lengths) % block > 0
    last_before, last_through = _rows(before, blocks.last), _rows(through, blocks.last)
    final = _choose(open_end, last_before, last_through)
    final = _choose(lengths == 0, start, final)
    chosen = (before.source, before.position, final.source, final.position)
    return blocks.token, position, local_source, *(part.clone() for part in chosen)


def _own_lists(
    scores: Tensor,
    recent_score: Tensor | None,
    seen: Tensor,
    blocks: AlignedBlocks,
    source_of: Callable[[Tensor, Tensor], Tensor],
    num_globals: int,
) -> _Lists:
    """Each block's own tokens, sorted."""
    position, document = blocks.position, blocks.document
    value = scores.flatten()[blocks.token.clamp_min(0)]
    if recent_score is not None:
        past = position < seen[document][:, None]
        recent = recent_score[document].gather(1, position % recent_score.shape[1])
        value = torch.where(past, recent.to(value.dtype), value)
    value = value.masked_fill(~blocks.filled, float("-inf"))
    source = source_of(position, blocks.filled)
    return _sorted(_Lists(value, source, torch.where(blocks.filled, position, -1)), min(num_globals, value.shape[1]))


def _sorted(lists: _Lists, keep: int) -> _Lists:
    """Best first. The sort is stable and entries come in order of position, so equal scores stay in that order."""
    score, order = lists.score.sort(dim=-1, descending=True, stable=True)
    order = order[:, :keep]
    return _Lists(score[:, :keep], lists.source.gather(1, order), lists.position.gather(1, order))


def _merge(earlier: _Lists, later: _Lists, num_globals: int) -> _Lists:
    joined = _Lists(*(torch.cat(pair, dim=1) for pair in zip(earlier, later, strict=True)))
    return _sorted(joined, min(num_globals, joined.score.shape[1]))


def _rows(lists: _Lists, index: Tensor) -> _Lists:
    return _Lists(*(part[index] for part in lists))


def _choose(condition: Tensor, yes: _Lists, no: _Lists) -> _Lists:
    return _Lists(*(torch.where(condition[:, None], a, b) for a, b in zip(yes, no, strict=True)))


def _scan(own: _Lists, start: _Lists, first: Tensor, document: Tensor, num_globals: int, most: int) -> _Lists:
    """Row c: the best of the document's ``start`` and of its blocks, ``most`` of them, up to and with c (T, G)."""
    count = own.score.shape[0]
    index = torch.arange(count, device=first.device)
    # Each block's distance to its document's first block.
    opened = torch.where(first, index, 0).cummax(0).values
    lists, stride = own, 1
    while stride < min(count, most):
        earlier = _rows(lists, (index - stride).clamp_min(0))
        reaches = index - stride >= opened
        nothing = _Lists(torch.full_like(earlier.score, float("-inf")), *(torch.full_like(p, -1) for p in earlier[1:]))
        lists = _merge(_choose(reaches, earlier, nothing), lists, num_globals)
        stride *= 2
    return _padded(_merge(_rows(start, document), lists, num_globals), num_globals)


def _padded(lists: _Lists, num_globals: int) -> _Lists:
    missing = num_globals - lists.score.shape[1]
    if missing == 0:
        return lists
    fills = (float("-inf"), -1, -1)
    return _Lists(
        *(torch.nn.functional.pad(part, (0, missing), value=fill) for part, fill in zip(lists, fills, strict=True))
    )
