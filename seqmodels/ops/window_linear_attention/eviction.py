"""The tokens that leave a sliding window, as a sequence of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmodels.layout import Layout


def evicted_tokens(
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    layout: Layout | None = None,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Key and value of the token that leaves the window as each token comes in: k_{i - window}, v_{i - window}.

    A linear attention over this sequence, causal and with its own token, has at token i read exactly the
    tokens j <= i - window: those that the window of i does not hold.

    Args:
        k: (batch, length, heads, head_dim). v: (batch, length, heads, value_dim).
        window: tokens that the window holds, the newest included.
        layout: documents; None: one a row.
        key_cache, value_cache: rings (documents, heads, window, width) of the tokens before these; slot p mod
            window holds position p.
        position: (documents,) int64, tokens seen before. Given together with the rings.

    Returns:
        k (batch, length, heads, head_dim), and v with a further column of ones (batch, length, heads,
        value_dim + 1), the normaliser's. Both are zero where no token leaves.
    """
    values = pad(v, (0, 1), value=1.0)
    if position is None or key_cache is None or value_cache is None:
        k, values = _shifted(k, window), _shifted(values, window)
        if layout is None:
            return k, values
        leaves = (layout.valid & (layout.position >= window))[..., None, None]
        return torch.where(leaves, k, 0), torch.where(leaves, values, 0)
    batch_size, length = k.shape[:2]
    if layout is None:
        document = torch.arange(batch_size, device=k.device)[:, None]
        at = torch.arange(length, device=k.device).expand(batch_size, length)
        valid = torch.ones_like(at, dtype=torch.bool)
    else:
        document, at, valid = layout.document.clamp_min(0), layout.position, layout.valid
    absolute = position[document] + at
    here = at >= window
    grid = torch.arange(batch_size * length, device=k.device).view(batch_size, length) - window
    ring = batch_size * length + document * window + absolute % window
    leaves = valid & (absolute >= window)
    row = torch.where(leaves, torch.where(here, grid, ring), 0).flatten()

    def gathered(new: Tensor, cache: Tensor) -> Tensor:
        rows = torch.cat([new.flatten(0, 1), cache.transpose(1, 2).flatten(0, 1).to(new.dtype)])
        return rows.index_select(0, row).view(new.shape).masked_fill(~leaves[..., None, None], 0)

    return gathered(k, key_cache), gathered(values, pad(value_cache, (0, 1), value=1.0))


def _shifted(x: Tensor, by: int) -> Tensor:
    """x moved to later tokens, zeros in front."""
    return pad(x, (0, 0, 0, 0, by, 0))[:, : x.shape[1]]
