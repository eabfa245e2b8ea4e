"""The state behind a packed batch, as one gather."""

from __future__ import annotations

import torch
from torch import Tensor


def final_state_of(x: Tensor, initial_state: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """The last W-1 inputs of every document, (documents, W-1, channels) of ``initial_state``'s dtype.

    Row j is input ``length - (W-1) + j`` of the document, or row ``length + j`` of its initial state.
    """
    history = initial_state.shape[1]
    from_end = lengths[:, None] - history + torch.arange(history, device=x.device)
    in_document = from_end >= 0
    token = ((starts[:, None] + from_end) * in_document).clamp(max=x.shape[0] * x.shape[1] - 1)
    inputs = x.reshape(-1, x.shape[2])[token].to(initial_state.dtype)
    row = (from_end + history).clamp(0, max(history - 1, 0))
    kept = initial_state.gather(1, row[..., None].expand_as(inputs))
    return torch.where(in_document.unsqueeze(-1), inputs, kept)
