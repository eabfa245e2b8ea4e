"""Linear recurrence, token by token: the definition that the others are judged by.

    h[t] = decay[t] h[t-1] + x[t]

D documents, C channels (complex ones as complex numbers inside).
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.linear_recurrence.numbers import components_of, numbers_of


def forward(
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch_size, length = x.shape[:2]
    tokens = numbers_of(x, x).flatten(0, 1)
    decays = numbers_of(decay.expand(x.shape), x).flatten(0, 1)
    if starts is None or lengths is None:
        spans = [(row * length, length) for row in range(batch_size)]
    else:
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    if initial_state is None:
        initial_state = x.new_zeros(len(spans), *x.shape[2:])

    states = list(torch.zeros_like(tokens))
    final_state = []
    for (start, size), state in zip(spans, numbers_of(initial_state, x), strict=True):
        for t in range(start, start + size):
            state = decays[t] * state + tokens[t]
            states[t] = state
        final_state.append(state)
    return components_of(torch.stack(states)).view(x.shape), components_of(torch.stack(final_state))
