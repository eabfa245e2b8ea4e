"""Long convolution, tap by tap and document by document: the definition.

    y[t, r] = sum_j kernel[r, :, j] u[t - j]  +  sum_j reverse_kernel[r, :, j] u[t + 1 + j]

u is (initial state, x) of the document. P rows of initial state, C channels, R rows of kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor,
    kernel: Tensor,
    reverse_kernel: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    batch_size, length, channels = x.shape
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens = x.reshape(-1, channels).to(compute)
    kernel_KRC = kernel.to(compute).movedim(-1, 0)
    if starts is None or lengths is None:
        spans = [(row * length, length) for row in range(batch_size)]
    else:
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    y = tokens.new_zeros(batch_size * length, kernel.shape[0], channels)
    for document, (start, size) in enumerate(spans):
        if size == 0:
            continue
        u = tokens[start : start + size, None]
        history = 0
        if initial_state is not None:
            history = initial_state.shape[1]
            u = torch.cat([initial_state[document, :, None].to(compute), u])
        total = torch.zeros_like(u).expand(-1, kernel.shape[0], -1)
        for j in range(min(kernel_KRC.shape[0], u.shape[0])):
            lagged = torch.nn.functional.pad(u[: u.shape[0] - j], (0, 0, 0, 0, j, 0))
            total = total + kernel_KRC[j] * lagged
        if reverse_kernel is not None:
            for j in range(min(reverse_kernel.shape[-1], size - 1)):
                ahead = torch.nn.functional.pad(u[j + 1 :], (0, 0, 0, 0, 0, j + 1))
                total = total + reverse_kernel[..., j].to(compute) * ahead
        here = torch.arange(start, start + size, device=x.device)
        y = torch.index_copy(y, 0, here, total[history:])
    return y.view(batch_size, length, kernel.shape[0], channels).to(x.dtype)
