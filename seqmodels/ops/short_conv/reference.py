"""Short convolution, document by document: the definition that the others are judged by.

    z[t] = bias + sum_w weight[:, w] u[t - (W-1) + w],   u = (initial state, x of the document)

D documents, W the width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    batch_size, length, channels = x.shape
    width = weight.shape[1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens_NC = x.reshape(-1, channels).to(compute)
    if starts is None or lengths is None:
        spans = [(row * length, length) for row in range(batch_size)]
    else:
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    if initial_state is None:
        initial_state = tokens_NC.new_zeros(len(spans), width - 1, channels)

    y = torch.zeros_like(tokens_NC)
    final_state = []
    for (start, size), before_WC in zip(spans, initial_state, strict=True):
        history_TC = torch.cat([before_WC, tokens_NC[start : start + size]])
        final_state.append(history_TC[size:])
        if size == 0:
            continue
        z = torch.zeros_like(history_TC[:size])
        for w in range(width):
            z = z + weight[:, w].to(compute) * history_TC[w : w + size]
        if bias is not None:
            z = z + bias.to(compute)
        here = torch.arange(start, start + size, device=x.device)
        y = torch.index_copy(y, 0, here, torch.nn.functional.silu(z) if silu else z)
    return y.view(x.shape).to(x.dtype), torch.stack(final_state)
