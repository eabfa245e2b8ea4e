"""Packed documents that go on unevenly, some without a token in a call, equal each document whole."""

from __future__ import annotations

import pytest
import torch

from seqmodels.channel import CHANNELS
from seqmodels.layout import Layout
from seqmodels.mixers import MIXERS

LAYERS = {
    "sparse_global_attention": dict(num_heads=2, window=5, num_globals=3, block=4),
    "kv_shift_attention": dict(num_heads=2, window=6),
    "hydra_diag": dict(),
    "workspace": dict(num_slots=6, rank=4, active=3, segment=4),
    "chunk_moe": dict(num_experts=4, d_hidden=8, chunk_size=4),
}
ROWS = ((0, 1), (2, 3, 4))  # documents that share a row
LENGTH = 13
# Tokens that each of the five documents gets in a call: ends fall on every place in a block of 4.
CALLS = ((3, 5, 0, 1, 7), (0, 4, 4, 0, 1), (5, 0, 8, 7, 0), (5, 4, 1, 5, 5))


def grid(documents: torch.Tensor, seen: list[int], take: tuple[int, ...]) -> tuple[torch.Tensor, Layout]:
    """The next ``take`` tokens of each document, NaN elsewhere. A document without a token keeps its slot."""
    width = max(sum(take[i] for i in row) for row in ROWS) + 1
    x = torch.full((len(ROWS), width, documents.shape[-1]), float("nan"), dtype=documents.dtype)
    document, position = torch.full((len(ROWS), width), -1), torch.zeros(len(ROWS), width, dtype=torch.int64)
    starts = []
    for number, row in enumerate(ROWS):
        column = 0
        for i in row:
            part = slice(column, column + take[i])
            starts.append(number * width + column)
            x[number, part] = documents[i, seen[i] : seen[i] + take[i]]
            document[number, part], position[number, part] = i, torch.arange(take[i])
            column += take[i]
    return x, Layout(torch.tensor(starts), torch.tensor(take), document, position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_uneven_pieces_are_the_whole(name, dtype):
    torch.manual_seed(0)
    layer = (MIXERS if name in MIXERS else CHANNELS)[name](16, **LAYERS[name]).to(dtype)
    documents = torch.randn(5, LENGTH, 16, dtype=dtype)
    whole = layer(documents, return_state=True)
    state, seen, found = layer.init_state(5, dtype=dtype), [0] * 5, [[] for _ in range(5)]
    for take in CALLS:
        x, layout = grid(documents, seen, take)
        y, state, _ = layer(x, state, layout=layout, return_state=True)
        for i in range(5):
            found[i].append(y[layout.document == i])
            seen[i] += take[i]
    assert seen == [LENGTH] * 5
    # Sums of at most 16 terms of size about 1 in another order, through a handful of products.
    bound = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(torch.stack([torch.cat(part) for part in found]), whole.y, rtol=bound, atol=bound)
    for (field, ours), (_, theirs) in zip(state.tensors(), whole.state.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, msg=field)
