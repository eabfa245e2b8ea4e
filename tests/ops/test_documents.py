"""Document tables against loops over the documents."""

from __future__ import annotations

import pytest
import torch

from seqmodels import Layout
from seqmodels.ops.documents import chunk_table, token_table

LAYOUTS = {
    "packed": Layout.packed([[5, 1, 4], [7], [2, 9]], 12, capacity=9),
    "full": Layout.full(3, 8),
    "left padded": Layout.left_padded([1, 6, 3]),
    "empty": Layout.packed([[], []], 4, capacity=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_token_table(layout):
    table = token_table(layout.starts, layout.lengths, layout.batch_size, layout.length)
    assert torch.equal(table.valid, layout.valid)
    assert torch.equal(table.document[layout.valid], layout.document[layout.valid])
    assert torch.equal(table.first, layout.valid & (layout.position == 0))
    ends = (layout.starts + layout.lengths - 1)[layout.lengths > 0]
    assert torch.equal(table.last.flatten().nonzero().flatten(), ends)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_chunk_table(layout, chunk_size):
    tokens = layout.batch_size * layout.length
    table = chunk_table(layout.starts, layout.lengths, tokens, chunk_size)
    assert table.token.shape == (tokens // chunk_size + layout.num_documents, chunk_size)
    chunk = 0
    for slot in range(layout.num_documents):
        start, length = layout.starts[slot].item(), layout.lengths[slot].item()
        for begin in range(0, length, chunk_size):
            expected = list(range(start + begin, start + min(begin + chunk_size, length)))
            assert table.token[chunk][table.valid[chunk]].tolist() == expected
            assert table.valid[chunk].sum() == len(expected)
            assert table.document[chunk] == slot
            assert table.first[chunk].item() == (begin == 0)
            chunk += 1
        if length:
            assert table.last[slot] == chunk - 1
    assert not table.valid[chunk:].any()
    assert table.first[chunk:].all()
