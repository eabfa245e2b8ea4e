"""The Triton kernels of sparse global attention under the interpreter, in float32, against the definition."""

from __future__ import annotations

import pytest
import torch
from two_times_rule import check_against

import seqmodels
from seqmodels import Layout
from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.sparse_attention import advance, empty, sparse_attention
from seqmodels.ops.sparse_attention import triton as implementation
from seqmodels.ops.sparse_attention.triton_tiles import tile_of

SMALL = tile_of(16, 16, 4, 1)  # several tiles of rows and of keys in a problem that the interpreter can do
CASES = {
    "ties": dict(length=15, window=5, num_globals=4, block=4, ties=True, batch=2),
    "the window alone": dict(length=25, window=9, num_globals=0, block=7),
    "every earlier block": dict(length=23, window=6, num_globals=25, block=5),
    "shorter than a block": dict(length=4, window=9, num_globals=3, block=8),
    "one token": dict(length=1, window=4, num_globals=3, block=4),
    "every token a block": dict(length=7, window=3, num_globals=2, block=1),
    "itself alone": dict(length=4, window=1, num_globals=2, block=1),
    "several tiles": dict(length=55, window=26, num_globals=19, block=18),
    "groups of three": dict(length=19, window=11, num_globals=4, block=8, heads=6, kv_heads=2, width=20),
    "documents": dict(length=31, window=11, num_globals=5, block=6, packed=[[1, 19, 6], [25]]),
    "state": dict(length=13, window=13, num_globals=5, block=8, past=21),
    "state of less than a window": dict(length=9, window=13, num_globals=5, block=8, past=5),
    "state at an edge": dict(length=9, window=8, num_globals=3, block=8, past=16),
    "state of documents": dict(length=13, window=5, num_globals=3, block=4, packed=[[5, 8]], past=11),
}
NAMES = ("q", "k", "v", "scores", "past_k", "past_v", "past_scores")


def problem(
    length, window, num_globals, block, *, ties=False, batch=1, heads=2, kv_heads=1, width=16, packed=None, past=0
):  # fmt: skip
    """Tensors by name, and the rest."""
    generator = torch.Generator().manual_seed(length + window)
    batch = batch if packed is None else len(packed)
    layout = None if packed is None else Layout.packed(packed, length, capacity=5)
    documents = batch if layout is None else layout.num_documents

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def tokens(rows, count):
        scores = draw(rows, count)
        return (
            draw(rows, count, kv_heads, width),
            draw(rows, count, kv_heads, width),
            scores.round() if ties else scores,
        )

    # v is a part of a wider projection, as the layer passes it.
    tensors = [draw(batch, length, heads, 2 * width)[..., width:], *tokens(batch, length)]
    if past:
        tensors += tokens(documents, past)
    sizes = dict(window=window, num_globals=num_globals, block=block)
    return dict(zip(NAMES, tensors, strict=False)), layout, documents, sizes


def run(tensors, layout, documents, sizes, dtype, backend):
    """The output and every gradient, those through the state included."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    with seqmodels.backend(backend):
        cache = None
        if "past_k" in leaves:
            start = empty(documents, *leaves["past_k"].shape[2:], **sizes, dtype=dtype)
            cache = advance(start, *(leaves[name] for name in ("past_k", "past_v", "past_scores")))
        y = sparse_attention(*(leaves[name] for name in NAMES[:4]), **sizes, cache=cache, layout=layout)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        found = torch.autograd.grad(y, list(leaves.values()), weights.to(dtype), materialize_grads=True)
    return {"y": y.detach()} | {f"grad {name}": value for name, value in zip(leaves, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_against_definition(case, monkeypatch):
    monkeypatch.setattr(KernelSpec, "tile", lambda self, *_: self.tiles[0] if "collect" in self.name else SMALL)
    arguments = problem(**CASES[case])
    exact, low = (run(*arguments, dtype, "reference") for dtype in (torch.float64, torch.float32))
    check_against(run(*arguments, torch.float32, "triton"), low, exact, case)


@pytest.mark.parametrize("case", ["several tiles", "documents"])
def test_shipped_tile(case):
    arguments = problem(**CASES[case])
    exact, low = (run(*arguments, dtype, "reference") for dtype in (torch.float64, torch.float32))
    check_against(run(*arguments, torch.float32, "triton"), low, exact, case)


def test_heads_in_chunks_give_the_same_bits(monkeypatch):
    """Few tokens a choice and many choices: the parts of all heads would be larger than the bound on them."""
    arguments = problem(length=12, window=2, num_globals=8, block=2, kv_heads=2)
    counts = []
    collect = implementation._collect
    monkeypatch.setattr(implementation, "_collect", lambda *given: counts.append(given[0].shape[1]) or collect(*given))
    found = run(*arguments, torch.float32, "triton")
    assert counts == [16] * 4 + [1]  # keys and values of one head, then of the other; the biases
    again = run(*arguments, torch.float32, "triton")
    for name in found:
        assert torch.equal(found[name], again[name]), name
    exact, low = (run(*arguments, dtype, "reference") for dtype in (torch.float64, torch.float32))
    check_against(found, low, exact, "heads in chunks")


def test_padding_may_hold_nan():
    """Left padding puts it where gathers of "no token" would read: the first row."""
    layout = Layout.left_padded([15, 5], 17)
    tensors, _, documents, sizes = problem(length=17, window=6, num_globals=3, block=5, batch=2)
    for x in tensors.values():
        x[~layout.valid] = float("nan")
    found = run(tensors, layout, documents, sizes, torch.float32, "triton")
    for name, x in found.items():
        assert x[~layout.valid].abs().max() == 0, name
        assert x.isfinite().all(), name
    alone = run({name: x[1:, 12:] for name, x in tensors.items()}, None, 1, sizes, torch.float32, "triton")
    torch.testing.assert_close(found["y"][1:, 12:], alone["y"])


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [(256, torch.float32, "head widths up to 128, not 256"), (16, torch.float64, "not torch.float64")],
)
def test_what_it_does_not_take(width, dtype, message):
    arguments = problem(length=5, window=4, num_globals=2, block=2, width=width)
    with pytest.raises(seqmodels.BackendUnavailable, match=message):
        run(*arguments, dtype, "triton")
