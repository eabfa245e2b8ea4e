"""Softmax attention by the flash-attn package, where it is installed: windows and documents, no cache.

Documents go to its variable-length kernel as they lie in the grid. Its boundaries are the
documents' first and last tokens and the rows' edges, sorted, so that runs of padding are
sequences of their own and no boundary has to be known on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout


def refusal(q: Tensor, key_cache: Tensor | None, pinned: int = 0) -> str | None:
    """Why flash-attn cannot take these tensors, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes in float16 and bfloat16; q is {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"flash-attn needs a head_dim of at most 256, a multiple of 8; it is {q.shape[-1]}"
    if key_cache is not None:
        return "flash-attn has no gradient through a cache"
    if pinned:
        return f"flash-attn's window cannot keep {pinned} pinned tokens"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, window: int | None, scale: float, bidirectional: bool
) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

    # flash-attn counts the keys before the query; ours counts the query itself too.
    reach = -1 if window is None else window - 1
    options = {
        "softmax_scale": scale, "causal": not bidirectional, "window_size": (reach, reach if bidirectional else 0)
    }  # fmt: skip
    if layout is None:
        return flash_attn_func(q, k, v, **options)
    edges = boundaries(layout)
    length = q.shape[1]
    y = flash_attn_varlen_func(*(t.flatten(0, 1) for t in (q, k, v)), edges, edges, length, length, **options)
    return torch.where(layout.valid[:, :, None, None], y.view(q.shape), 0)


def boundaries(layout: Layout) -> Tensor:
    """int32 edges of all runs, documents and padding, in the flat grid, ascending, with repeats."""
    rows = torch.arange(layout.batch_size + 1, device=layout.starts.device) * layout.length
    edges = torch.cat([layout.starts, layout.starts + layout.lengths, rows])
    return edges.sort().values.to(torch.int32)
