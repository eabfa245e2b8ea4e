"""Document tables against loops over the documents."""

from __future__ import annotations

import pytest
import torch

from seqmodels import Layout
from seqmodels.ops.documents import aligned_blocks, chunk_table, token_table

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


@pytest.mark.parametrize("block", [1, 3, 4, 100])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_aligned_blocks(layout, block):
    """Blocks start at multiples of ``block`` of the whole document, of which 0, 1, 2, ... tokens came before."""
    tokens = layout.batch_size * layout.length
    seen = torch.arange(layout.num_documents)
    table = aligned_blocks(layout.starts, layout.lengths, seen, layout.batch_size, layout.length, block)
    assert table.token.shape == (tokens // block + 2 * layout.num_documents, block)
    row, stands = 0, [-1] * tokens
    for slot, (start, length) in enumerate(zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)):
        begins = range(slot // block * block, slot + length, block) if length else ()
        for begin in begins:
            end = min(begin + block, slot + length)
            positions = list(range(begin, end))
            flat = [start + position - slot if position >= slot else -1 for position in positions]
            missing = block - len(positions)
            assert table.position[row].tolist() == positions + [0] * missing
            assert table.token[row].tolist() == flat + [-1] * missing
            assert table.filled[row].tolist() == [True] * len(positions) + [False] * missing
            assert (table.used[row].item(), table.document[row].item()) == (True, slot)
            assert table.first[row] == (begin == begins[0])
            for place, token in enumerate(flat):
                if token >= 0:
                    stands[token] = row * block + place
            row += 1
        assert table.last[slot] == (row - 1 if length else 0)
    assert not table.used[row:].any()
    assert (table.token[row:] == -1).all()
    assert table.first[row:].all()
    assert table.slot_of_token.tolist() == stands
