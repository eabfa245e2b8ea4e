"""Next-token targets and the loss over them."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.linear_cross_entropy import IGNORE_INDEX


def next_token_targets(tokens: Tensor, layout: Layout | None = None) -> Tensor:
    """targets[b, i] = tokens[b, i + 1] inside one document, ``IGNORE_INDEX`` at each document's end.

    With prefix lengths, nothing inside a document's prefix is scored: the first target belongs to
    the first token after it.

    Args:
        tokens: (batch, length) token ids.
        layout: documents of that grid; each row is one document when omitted.

    Returns:
        (batch, length) int64.
    """
    last = tokens.new_full((tokens.shape[0], 1), IGNORE_INDEX)
    targets = torch.cat([tokens[:, 1:], last], 1).long()
    if layout is None:
        return targets
    following = torch.cat([layout.document[:, 1:], torch.full_like(last, -1, dtype=torch.int64)], 1)
    scored = layout.valid & (following == layout.document) & ~inside_prefix(layout)
    return targets.masked_fill(~scored, IGNORE_INDEX)


def inside_prefix(layout: Layout) -> Tensor:
    """(batch, length) bool: tokens inside their document's prefix."""
    if layout.prefix_lengths is None:
        return torch.zeros_like(layout.valid)
    prefix = layout.prefix_lengths[layout.document.clamp(min=0)]
    return layout.valid & (layout.position < prefix)


def check_ids(
    ids: Tensor,
    count: int,
    name: str,
    *,
    ignore_index: int | None = None,
    kind: str = "id",
    bound: str = "vocab_size",
) -> None:
    """Refuses ids outside [0, count), naming the first one; ``kind`` and ``bound`` are the error's words.

    On a GPU (reading would stall it) and under compilation the check is left to the embedding's own
    device assertion.
    """
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"{name} has dtype {ids.dtype}; expected integers (torch.int64)")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    wrong = (ids < 0) | (ids >= count)
    if ignore_index is not None:
        wrong &= ids != ignore_index
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        allowed = "" if ignore_index is None else f" (or {ignore_index} for no target)"
        hint = " Is the tokenizer the one this model was made for?" if kind == "id" else ""
        raise ValueError(
            f"{name}{list(index)} is {ids[index].item()}; expected 0 <= {kind} < {bound}={count}{allowed}.{hint}"
        )
