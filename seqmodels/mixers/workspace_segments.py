"""What the tokens of a segment leave for the slots of a workspace, and how rows are cut into segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmodels.layout import Layout
from seqmodels.ops.documents import AlignedBlocks

FLOOR = -1e30  # below every score, and finite: no NaN in differences


class Sums(NamedTuple):
    """An online softmax over tokens, for each slot: (..., slots), (..., slots), (..., slots, rank)."""

    largest: Tensor
    mass: Tensor
    gathered: Tensor


def gather(score: Tensor, value: Tensor, held: Tensor | None = None, past: Sums | None = None) -> Sums:
    """Sums of segments (..., tokens, slots or rank): over the tokens ``held`` (all), after what is ``past``."""
    if held is not None:
        score = score.masked_fill(~held[..., None], FLOOR)
    largest = score.amax(-2) if past is None else torch.maximum(score.amax(-2), past.largest)
    largest = largest.detach()  # it cancels: no gradient passes through it
    weight = (score - largest.unsqueeze(-2)).exp()
    if held is not None:
        weight = weight * held[..., None]
    mass = weight.sum(-2)
    with torch.autocast(score.device.type, enabled=False):  # as decode adds them
        gathered = weight.mT @ value
    if past is None:
        return Sums(largest, mass, gathered)
    scale = (past.largest - largest).exp()
    return Sums(largest, mass + scale * past.mass, gathered + scale[..., None] * past.gathered)


def cut(tokens: Tensor, size: int) -> Tensor:
    """(batch, length, ...) as (batch, ceil(length / size), size, ...), with zeros behind the end."""
    count = -(-tokens.shape[1] // size)
    if tokens.shape[1] < count * size:
        tokens = pad(tokens, (0, 0) * (tokens.dim() - 2) + (0, count * size - tokens.shape[1]))
    return tokens.unflatten(1, (count, size))


def open_segments(past: Sums, position: Tensor, blocks: AlignedBlocks, segment: int) -> Sums:
    """Of what each document had gathered at its ``position``, the part of blocks that go on inside a segment."""
    inside = (blocks.first & (position[blocks.document] % segment > 0))[:, None]
    largest, mass, gathered = (tensor[blocks.document] for tensor in past)
    return Sums(
        torch.where(inside, largest, FLOOR),
        torch.where(inside, mass, 0.0),
        torch.where(inside[..., None], gathered, 0.0),
    )


def mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0).sum() / counted.sum().clamp_min(1)


def segments(blocks: AlignedBlocks, documents: Tensor) -> Layout:
    """The blocks of every document as a layout of one row; ``documents`` has one entry for each."""
    used, index = blocks.used, torch.arange(blocks.used.shape[0], device=documents.device)
    count = torch.zeros_like(documents).index_add(0, blocks.document, used.long())
    first = count.cumsum(0) - count  # ascending, past documents without a token too
    document = torch.where(used, blocks.document, -1)
    position = torch.where(used, index - first[blocks.document], 0)
    return Layout(first, count, document[None], position[None])
