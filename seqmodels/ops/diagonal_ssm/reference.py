"""A diagonal SSM, token by token and document by document: the definition.

    x[t, n] = e^{z[n]} x[t-1, n] + b[n] u[t],   y[t, r] = sum_n Re(c[r, n] x[t, n]) + skip[r] u[t]

With ``reverse`` tokens come from the end, and an output is read before its token enters the state. Then there is no
final state (zeros stand in its place).

D documents, H heads, N modes, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch_size, length, heads = u.shape
    b_HN, c_RHN = (torch.view_as_complex(value.contiguous()) for value in (b, c))
    decay_HN = torch.exp(torch.view_as_complex(z.contiguous())).to(b_HN.dtype)
    if starts is None or lengths is None:
        spans = [(row * length, length) for row in range(batch_size)]
    else:
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    tokens = u.flatten(0, 1)
    y = u.new_zeros((batch_size * length, c.shape[0], heads))
    finals = []
    for document, (start, size) in enumerate(spans):
        x_HN = torch.zeros_like(b_HN)
        if initial_state is not None:
            x_HN = torch.view_as_complex(initial_state[document].contiguous())
        outputs = []
        for t in reversed(range(start, start + size)) if reverse else range(start, start + size):
            before = x_HN
            x_HN = decay_HN * x_HN + b_HN * tokens[t, :, None]
            seen = (c_RHN * (before if reverse else x_HN)).real.sum(-1)
            outputs.append(seen if reverse else seen + skip * tokens[t])
        if outputs:
            values = torch.stack(outputs[::-1] if reverse else outputs)
            y = torch.index_copy(y, 0, torch.arange(start, start + size, device=u.device), values)
        finals.append(torch.zeros_like(x_HN) if reverse else x_HN)
    final_state = torch.view_as_real(torch.stack(finals))
    return y.view(batch_size, length, c.shape[0], heads), final_state.clone(memory_format=torch.contiguous_format)
