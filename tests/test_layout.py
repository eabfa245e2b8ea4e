"""Layout: where documents lie, spelled out on small grids and checked on random ones."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels import Layout


def test_packed_grid():
    layout = Layout.packed([[1, 3], [2]], length=5, capacity=4)
    assert layout.starts.tolist() == [0, 1, 5, 10]
    assert layout.lengths.tolist() == [1, 3, 2, 0]
    assert layout.document.tolist() == [[0, 1, 1, 1, -1], [2, 2, -1, -1, -1]]
    assert layout.position.tolist() == [[0, 0, 1, 2, 0], [0, 1, 0, 0, 0]]
    assert layout.valid.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]
    assert layout.last_token().tolist() == [0, 3, 6, 0]
    assert (layout.batch_size, layout.length, layout.num_documents) == (2, 5, 4)
    assert layout.prefix_lengths is None
    assert all(t.dtype == torch.int64 for t in (layout.starts, layout.lengths, layout.document, layout.position))


def test_packed_defaults_to_the_fullest_row_and_to_its_documents():
    layout = Layout.packed([[2, 2], [], [3]])
    assert (layout.batch_size, layout.length, layout.num_documents) == (3, 4, 3)
    assert layout.document[1].tolist() == [-1] * 4


def test_left_padded_prompts_end_at_the_last_column():
    layout = Layout.left_padded([1, 3], length=4)
    assert layout.starts.tolist() == [3, 5]
    assert layout.document.tolist() == [[-1, -1, -1, 0], [-1, 1, 1, 1]]
    assert layout.position.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2]]
    assert layout.last_token().tolist() == [3, 7]


def test_full_equals_left_padding_without_padding():
    full = Layout.full(3, 4, prefix_lengths=[0, 2, 4])
    padded = Layout.left_padded([4] * 3, prefix_lengths=[0, 2, 4])
    for ours, theirs in zip(pytree.tree_leaves(full), pytree.tree_leaves(padded), strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)


def test_documents_cut_to_their_prefixes():
    layout = Layout.packed([[4], [2, 3]], capacity=5, prefix_lengths=[3, 0, 9])
    assert layout.prefixes().lengths.tolist() == [3, 0, 3, 0, 0]
    assert layout.prefixes().starts.tolist() == layout.starts.tolist()
    assert layout.prefixes().prefix_lengths is None
    below = layout.with_prefix(torch.tensor([-1, 1, 1, 0, 0]))
    assert below.prefixes().lengths.tolist() == [0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"prefix_lengths is \(2,\); expected \(5,\), one for each"):
        layout.with_prefix(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="has no prefix_lengths"):
        Layout.full(1, 4).prefixes()


def test_prefix_lengths_follow_reading_order_and_unused_slots_have_none():
    layout = Layout.packed([[4], [2, 3]], capacity=5, prefix_lengths=[3, 0, 1])
    assert layout.prefix_lengths.tolist() == [3, 0, 1, 0, 0]
    assert layout.with_prefix(torch.ones(5, dtype=torch.int64)).prefix_lengths.tolist() == [1] * 5
    assert layout.prefix_lengths.tolist() == [3, 0, 1, 0, 0]


def test_it_is_a_pytree_that_moves():
    layout = Layout.packed([[2], [1]])
    leaves, spec = pytree.tree_flatten(layout)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.starts is layout.starts
    assert again.prefix_lengths is None
    assert layout.to("meta").document.device.type == "meta"
    assert Layout.full(2, 3, device="meta").starts.device.type == "meta"


def test_full_compiles_for_every_length():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: Layout.full(*x.shape).position, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 9, 17):
        assert torch.equal(compiled(torch.zeros(3, length)), torch.arange(length).expand(3, length))
    assert len(graphs) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 3))
def test_packed_fields_agree(rows, spare_columns, spare_slots):
    columns = max(map(sum, rows)) + spare_columns
    documents = [entry for row in rows for entry in row]
    layout = Layout.packed(rows, columns, capacity=len(documents) + spare_slots)
    assert layout.lengths.tolist() == documents + [0] * spare_slots
    assert int(layout.valid.sum()) == sum(documents)
    document, position = layout.document.flatten(), layout.position.flatten()
    for slot, entry in enumerate(documents):
        begin = int(layout.starts[slot])
        assert begin // columns == (begin + entry - 1) // columns, "a document crosses rows"
        assert document[begin : begin + entry].tolist() == [slot] * entry
        assert position[begin : begin + entry].tolist() == list(range(entry))
        assert int(layout.last_token()[slot]) == begin + entry - 1
    assert layout.starts.tolist() == sorted(layout.starts.tolist())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout.packed([[2, 0]]), r"at least 1; row 0 has \[2, 0\]"),
        (lambda: Layout.packed([[1], [3, 3]], length=5), "row 1 holds 6 tokens in 2 documents.*5 columns"),
        (lambda: Layout.packed([[1, 1, 1]], capacity=2), "3 documents do not fit capacity=2"),
        (lambda: Layout.packed([[2]], prefix_lengths=[1, 1]), "2 prefix lengths for 1 documents"),
        (lambda: Layout.packed([[2]], prefix_lengths=[-1]), r"must not be negative; got \[-1\]"),
        (lambda: Layout.left_padded([3, 0]), "row 1 has 0 tokens; expected 1 to 3"),
        (lambda: Layout.left_padded([3], length=2), "row 0 has 3 tokens; expected 1 to 2"),
        (lambda: Layout.full(2, 4, prefix_lengths=[1]), "1 prefix lengths for 2 documents"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
