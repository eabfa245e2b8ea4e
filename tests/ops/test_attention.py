"""Softmax attention against dense masked attention in float64, on every path that a CPU can run."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqmodels
from seqmodels import BackendUnavailable, Layout
from seqmodels.ops.attention import append_to_cache, attention, attention_step, flex, masked
from seqmodels.ops.attention import flash as flash_path
from seqmodels.ops.attention import op as attention_op
from seqmodels.ops.attention import torch as blocked
from seqmodels.ops.attention.flex import needed_blocks
from seqmodels.ops.rotary import rotary, rotary_tables, token_positions

LENGTH = 150
LAYOUTS = {
    "rows": lambda: None,
    "packed": lambda: Layout.packed([[40, 1, 90], [150], [3, 70]], LENGTH, capacity=9),
    "left_padded": lambda: Layout.left_padded([150, 1, 77]),
}
BACKENDS = ("reference", "torch")  # "cpu" and "auto" are "torch" here


def inputs(heads: int = 4, groups: int = 2, head_dim: int = 8, batch: int = 3, length: int = LENGTH) -> list[Tensor]:
    shapes = [(batch, length, heads, head_dim), *[(batch, length, groups, head_dim)] * 2]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def visible_pairs(
    layout: Layout | None, batch: int, length: int, window: int | None, bidirectional: bool = False
) -> Tensor:
    """(batch, length, length) bool, from nothing but documents and columns."""
    column = torch.arange(length)
    distance = column[:, None] - column
    mask = ((distance >= 0) | bidirectional) & (distance.abs() < (window or length))
    mask = mask.expand(batch, length, length)
    if layout is None:
        return mask
    document = layout.document
    return mask & (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention with every score in memory; rows that see nothing are zero."""
    heads, head_dim = q.shape[2:]
    head_of = torch.arange(heads) * k.shape[2] // heads
    scores = torch.einsum("bihd,bjhd->bhij", q, k[:, :, head_of]) * (scale or 1 / math.sqrt(head_dim))
    weights = torch.where(mask[:, None], (scores - scores.detach().amax(-1, keepdim=True)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return torch.einsum("bhij,bjhd->bihd", weights, v[:, :, head_of])


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    return list(torch.autograd.grad((y * weight).sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 7, 64, 149, 1000])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_dense_masked_attention(bidirectional: bool, window: int | None, layout_name: str, backend: str) -> None:
    layout = LAYOUTS[layout_name]()
    leaves = inputs()
    expected = dense(*leaves, visible_pairs(layout, 3, LENGTH, window, bidirectional))
    with seqmodels.backend(backend):
        y = attention(*leaves, window=window, bidirectional=bidirectional, layout=layout)
        found = gradients(y, leaves)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients(expected, leaves), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_other_names_of_the_blocked_path(backend: str) -> None:
    leaves = [leaf.detach() for leaf in inputs()]
    with seqmodels.backend("torch"):
        expected = [attention(*leaves, window=window) for window in (None, 9)]
    with seqmodels.backend(backend):
        assert all(torch.equal(attention(*leaves, window=w), y) for w, y in zip((None, 9), expected, strict=True))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (6, 3)])
def test_grouped_heads_and_scale(heads: int, groups: int) -> None:
    leaves = inputs(heads, groups, 10, 2, 70)
    for window in (None, 9):
        expected = dense(*leaves, visible_pairs(None, 2, 70, window), scale=0.7)
        y = attention(*leaves, window=window, scale=0.7)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(y, leaves), gradients(expected, leaves), rtol=1e-11, atol=1e-11)


def caches_of(k: Tensor, v: Tensor, seen: list[int], capacity: int, pinned: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ring caches after the first ``seen[row]`` tokens of each row, written one token at a time."""
    caches = []
    for tokens in (k, v):
        rows = []
        for row, count in enumerate(seen):
            slots = [torch.zeros_like(tokens[row, 0]) for _ in range(capacity)]
            for position in range(count):
                ring = pinned + (position - pinned) % (capacity - pinned)
                slots[position if position < pinned else ring] = tokens[row, position]
            rows.append(torch.stack(slots, dim=1))
        caches.append(torch.stack(rows))
    return caches[0], caches[1], torch.tensor(seen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seen", [[0, 0, 0], [1, 1, 1], [13, 13, 13], [0, 5, 40]])
@pytest.mark.parametrize(("window", "capacity"), [(None, 120), (8, 8), (1, 1), (64, 64), (90, 80)])
def test_cache_stands_for_earlier_tokens(window: int | None, capacity: int, seen: list[int], backend: str) -> None:
    new = 20
    history_q, history_k, history_v = inputs(length=60)
    cache = caches_of(history_k, history_v, seen, capacity)
    q, k, v = (
        torch.stack([tokens[row, count : count + new] for row, count in enumerate(seen)])
        for tokens in (history_q, history_k, history_v)
    )
    expected_all = dense(history_q, history_k, history_v, visible_pairs(None, 3, 60, window))
    expected = torch.stack([expected_all[row, count : count + new] for row, count in enumerate(seen)])
    with seqmodels.backend(backend):
        y = attention(q, k, v, window=window, key_cache=cache[0], value_cache=cache[1], position=cache[2])
        found = gradients(y, [history_k, history_v])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients(expected, [history_k, history_v]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_continue_their_own_caches(backend: str) -> None:
    lengths, seen = [[12, 30], [50], [1, 20]], [3, 0, 17, 40, 9]
    layout = Layout.packed(lengths, 50, capacity=6)
    history = [torch.randn(6, 60, 2, 8, dtype=torch.float64) for _ in range(2)]
    cache = caches_of(*history, [*seen, 0], 16)
    q, k, v = inputs(length=50)
    with seqmodels.backend(backend):
        y = attention(q, k, v, window=16, layout=layout, key_cache=cache[0], value_cache=cache[1], position=cache[2])
    for document, (start, count) in enumerate(zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)):
        if count == 0:
            continue
        row, column = divmod(start, 50)
        span = slice(column, column + count)
        keys, values = (
            torch.cat([past[document, : seen[document]], new[row, span]])[None]
            for past, new in zip(history, (k, v), strict=True)
        )
        queries = torch.cat([torch.zeros(seen[document], 4, 8, dtype=torch.float64), q[row, span]])[None]
        alone = dense(queries, keys, values, visible_pairs(None, 1, queries.shape[1], 16))[0, seen[document] :]
        torch.testing.assert_close(y[row, span], alone, rtol=1e-12, atol=1e-12)
    assert y[~layout.valid].abs().max() == 0


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("capacity", [1, 16, 200])
def test_append_writes_the_ring(capacity: int, layout_name: str) -> None:
    layout = LAYOUTS[layout_name]()
    documents = 3 if layout is None else layout.num_documents
    _, k, v = inputs()
    seen = [(5 * document) % 23 for document in range(documents)]
    history = torch.randn(documents, 23, 2, 8, dtype=torch.float64)
    before = caches_of(history, history + 1, seen, capacity)
    after = append_to_cache(*before, k, v, layout=layout)
    starts = [row * LENGTH for row in range(3)] if layout is None else layout.starts.tolist()
    lengths = [LENGTH] * 3 if layout is None else layout.lengths.tolist()
    for document, (start, count) in enumerate(zip(starts, lengths, strict=True)):
        for index, (tokens, offset) in enumerate(((k, 0), (v, 1))):
            whole = torch.cat(
                [history[document, : seen[document]] + offset, tokens.flatten(0, 1)[start : start + count]]
            )
            expected = caches_of(whole[None], whole[None], [len(whole)], capacity)[0][0]
            assert torch.equal(after[index][document], expected)
        assert after[2][document] == seen[document] + count


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(4, 4, 8), (6, 2, 20), (3, 1, 64), (2, 2, 7)])
def test_step_equals_dense(heads: int, groups: int, head_dim: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the C++ kernel computes in float32")
    if backend == "cpu" and seqmodels.backends.missing("cpu"):
        pytest.skip(str(seqmodels.backends.missing("cpu")))
    for window, capacity, seen in [(None, 600, [0, 17, 599]), (5, 5, [0, 3, 1001]), (300, 300, [299, 300, 40])]:
        q, k, v = (tensor.detach().to(dtype) for tensor in inputs(heads, groups, head_dim, length=1))
        caches = [torch.randn(3, groups, capacity, head_dim, dtype=dtype) for _ in range(2)]
        expected_caches = [cache.clone() for cache in caches]
        expected, scale_of_error = [], []
        for row, count in enumerate(seen):
            for cache, token in zip(expected_caches, (k, v), strict=True):
                cache[row, :, count % capacity] = token[row, 0]
            filled = min(count + 1, capacity)
            keys, values = (cache[row, :, :filled].transpose(0, 1)[None].double() for cache in expected_caches)
            mask = torch.ones(1, 1, filled, dtype=torch.bool)
            expected.append(dense(q[row : row + 1].double(), keys, values, mask)[0, 0])
            scale_of_error.append(dense(q[row : row + 1].double(), keys, values.abs(), mask)[0, 0])
        with seqmodels.backend(backend):
            y = attention_step(q[:, 0], k[:, 0], v[:, 0], *caches, torch.tensor(seen), window=window)
        # The weights and y are rounded once each, relative to the weighted magnitudes; the float32
        # arithmetic before that stays below eight roundings.
        roundings = {torch.bfloat16: 2, torch.float32: 8, torch.float64: 64}[dtype]
        bound = roundings * torch.finfo(dtype).eps * torch.stack(scale_of_error)
        assert ((y - torch.stack(expected)).abs() <= bound).all()
        assert torch.equal(caches[0], expected_caches[0])
        assert torch.equal(caches[1], expected_caches[1])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("case", ["window", "packed", "packed window", "cache", "both ways", "both ways window"])
def test_memory_is_linear_in_length(case: str) -> None:
    length, heads, head_dim = 2048, 1, 4
    q, k, v, grad = (torch.randn(1, length, heads, head_dim) for _ in range(4))
    window = 16 if "window" in case else None
    layout = Layout.packed([[64] * 32], length) if "packed" in case else None
    cache = [torch.randn(1, 1, 3000, head_dim)] * 2 if case == "cache" else [None, None]
    position = torch.tensor([900]) if case == "cache" else None
    documents = (None, None) if layout is None else (layout.starts, layout.lengths)
    arguments = (q, k, v, *cache, position, *documents, window, 0.5, "both ways" in case, 0)
    with LargestTensor() as largest:
        blocked.backward(grad, *arguments, *blocked.forward(*arguments))
    # The longest tensors hold heads x head_dim numbers a token, or one block of queries by its keys.
    keys = length + (900 if case == "cache" else 0)
    assert largest.elements <= max(keys * 256 if case == "cache" else 0, 3000 * heads * head_dim)
    assert largest.elements < length * length / 4


def test_low_precision() -> None:
    q, k, v = (tensor.detach().bfloat16() for tensor in inputs())
    for window in (None, 9):
        mask = visible_pairs(None, 3, LENGTH, window)
        wide = [tensor.double() for tensor in (q, k, v)]
        y = attention(q, k, v, window=window)
        assert y.dtype == torch.bfloat16
        # The weights and the output are rounded to bfloat16 once each.
        bound = 2 * torch.finfo(torch.bfloat16).eps * dense(wide[0], wide[1], wide[2].abs(), mask)
        assert ((y - dense(*wide, mask)).abs() <= bound).all()


def test_autocast_keeps_the_cache_dtype() -> None:
    q, k, v = (tensor.detach().float() for tensor in inputs(length=6))
    caches = [torch.zeros(3, 2, 4, 8) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, window=4).dtype == torch.bfloat16
        assert (
            attention_step(q[:, 0], k[:, 0], v[:, 0], *caches, torch.zeros(3, dtype=torch.int64), window=4).dtype
            == torch.float32
        )
    assert torch.equal(caches[0][:, :, 0], k[:, 0])


def test_gradcheck_of_the_definition() -> None:
    q, k, v = inputs(2, 1, 3, 2, 5)
    caches = [torch.randn(3, 1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    layout = Layout.packed([[2, 3], [4]])
    position = torch.tensor([2, 0, 6])

    def run(*tensors: Tensor) -> Tensor:
        return attention(
            *tensors[:3], window=4, layout=layout, key_cache=tensors[3], value_cache=tensors[4], position=position
        )

    for backend in BACKENDS:
        with seqmodels.backend(backend):
            assert torch.autograd.gradcheck(run, (q, k, v, *caches))


@pytest.mark.parametrize(
    "dynamic", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_registration(dynamic: str) -> None:
    q, k, v = inputs(4, 2, 8, 2, 20)
    layout = Layout.packed([[8, 12], [5]], capacity=4)
    caches = [torch.randn(4, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    position = torch.tensor([3, 9, 0, 0])
    arguments = (q, k, v, *caches, position, layout.starts, layout.lengths, 4, 0.3, False, 2, "torch")
    torch.library.opcheck(attention_op._operator.overload, arguments, test_utils=dynamic)
    step = [tensor.detach()[:, 0].contiguous() for tensor in (q, k, v)]
    both = (q, k, v, None, None, None, layout.starts, layout.lengths, 6, 0.3, True, 0, "torch")
    torch.library.opcheck(attention_op._operator.overload, both, test_utils=dynamic)
    arguments = (*step, *(cache.detach()[:2].contiguous() for cache in caches), position[:2], 4, 0.3, 2, "auto")
    torch.library.opcheck(attention_op._step_operator.overload, arguments, test_utils=dynamic)


def pinned_pairs(pinned: int, length: int, window: int) -> Tensor:
    """(1, length, length) bool: key j is in the window of query i, or pinned and not after it."""
    column = torch.arange(length)
    distance = column[:, None] - column
    return ((distance >= 0) & ((distance < window) | (column < pinned)))[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize(("window", "pinned"), [(1, 1), (7, 5), (64, 3), (20, 100), (149, 4)])
def test_pinned_tokens_stay_visible(window: int, pinned: int, layout_name: str, backend: str) -> None:
    layout = LAYOUTS[layout_name]()
    leaves = inputs()
    mask = pinned_pairs(pinned, LENGTH, window).expand(3, -1, -1)
    if layout is not None:
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        seen = (distance >= 0) & ((distance < window) | (layout.position[:, None, :] < pinned))
        mask = visible_pairs(layout, 3, LENGTH, None) & seen
    expected = dense(*leaves, mask)
    with seqmodels.backend(backend):
        y = attention(*leaves, window=window, pinned=pinned, layout=layout)
        found = gradients(y, leaves)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients(expected, leaves), rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("path", [*BACKENDS, "flex", "masked"])
@pytest.mark.parametrize(("window", "pinned", "capacity"), [(8, 3, 11), (1, 2, 3), (8, 30, 38), (40, 3, 41)])
def test_pinned_slots_are_never_overwritten(
    monkeypatch: pytest.MonkeyPatch, window: int, pinned: int, capacity: int, path: str
) -> None:
    """Pieces, then one token at a time, against one dense call over everything; rows differ in what they have seen."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    q, k, v = inputs(length=45)
    if path == "flex":  # it has no backward on a CPU
        q, k, v = (tensor.detach() for tensor in (q, k, v))
    expected = dense(q, k, v, pinned_pairs(pinned, 45, window).expand(3, -1, -1))
    cache = [
        *(torch.zeros(3, 2, capacity, 8, dtype=torch.float64) for _ in range(2)),
        torch.zeros(3, dtype=torch.int64),
    ]
    wraps, outputs, at = capacity == window + pinned, [], 0
    for count in (2, 1, 17, 13):
        piece = [tensor[:, at : at + count] for tensor in (q, k, v)]
        if path in ("flex", "masked"):
            form = flex if path == "flex" else masked
            y = form.forward(*piece, *cache, None, window, 8**-0.5, False, pinned)
        else:
            with seqmodels.backend(path):
                y = attention(
                    *piece, window=window, pinned=pinned, key_cache=cache[0], value_cache=cache[1], position=cache[2]
                )
        cache = list(append_to_cache(*cache, *piece[1:], pinned=pinned, wraps=wraps))
        outputs.append(y)
        at += count
    found, wanted = torch.cat(outputs, 1), expected[:, :at]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if path != "flex":
        torch.testing.assert_close(gradients(found, [q, k, v]), gradients(wanted, [q, k, v]), rtol=1e-11, atol=1e-11)
    for backend, dtype in (("reference", q.dtype), ("torch", q.dtype), ("cpu", torch.float32)):
        if backend == "cpu" and seqmodels.backends.missing("cpu"):
            continue
        held = [cache[0].detach().to(dtype).clone(), cache[1].detach().to(dtype).clone(), cache[2].clone()]
        for t in range(at, min(45, capacity if not wraps else 45)):
            token = [tensor.detach()[:, t].to(dtype) for tensor in (q, k, v)]
            with seqmodels.backend(backend):
                y = attention_step(*token, *held, window=window, pinned=pinned)
            held[2] += 1
            # Sums of at most 45 weighted values of size 1 to 4: some roundings of the dtype.
            bound = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(y, expected[:, t].detach().to(dtype), rtol=bound, atol=bound)
        first = min(pinned, at)
        assert torch.equal(held[0][:, :, :first], k.detach()[:, :first].transpose(1, 2).to(dtype))


# ---- GPU paths, as far as a CPU can check them


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("past", ["none", "cached", "both ways"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 40])
def test_flex_masks(monkeypatch: pytest.MonkeyPatch, window: int | None, layout_name: str, past: str) -> None:
    bidirectional = past == "both ways"
    blocks = []

    def uncompiled(*tensors: Tensor, block_mask: flex.BlockMask, **options: object) -> Tensor:
        blocks.append(block_mask.to_dense()[0, 0].bool())
        return flex.flex_attention(*tensors, block_mask=block_mask, **options)

    monkeypatch.setattr(flex, "_compiled", lambda: uncompiled)
    monkeypatch.setattr(flex, "needed_blocks", lambda *args: needed.append(needed_blocks(*args)) or needed[-1])
    needed: list[Tensor] = []
    layout = LAYOUTS[layout_name]()
    q, k, v = (tensor.detach() for tensor in inputs())
    cache: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if past == "cached":
        documents = 3 if layout is None else layout.num_documents
        history = torch.randn(documents, 60, 2, 8, dtype=torch.float64)
        seen = [(17 * document) % 60 for document in range(documents)]
        cache = caches_of(history, history - 1, seen, window or 260)
    with torch.no_grad():
        y = flex.forward(q, k, v, *cache, layout, window, 0.3, bidirectional)
        with seqmodels.backend("reference"):
            expected = attention(
                q, k, v, window=window, bidirectional=bidirectional, scale=0.3, layout=layout,
                key_cache=cache[0], value_cache=cache[1], position=cache[2],
            )  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(blocks[0], needed[0])  # uncompiled, FlexAttention looks at pairs only


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_mask_of_all_scores(bidirectional: bool, window: int | None, layout_name: str) -> None:
    """What a GPU falls back on: the dense definition, whatever stands in the padding."""
    layout = LAYOUTS[layout_name]()
    leaves = inputs()
    expected = dense(*leaves, visible_pairs(layout, 3, LENGTH, window, bidirectional))
    given = leaves
    if layout is not None:
        given = [torch.where(layout.valid[:, :, None, None], leaf, torch.nan) for leaf in leaves]
    y = masked.forward(*given, None, None, None, layout, window, 8**-0.5, bidirectional)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, leaves), gradients(expected, leaves), rtol=1e-11, atol=1e-11)


def test_what_flex_attention_refuses() -> None:
    q = torch.zeros(1, 4, 2, 16)
    assert flex.refusal(q) is None
    assert "not float64" in str(flex.refusal(q.double()))
    assert "at least 16; it is 8" in str(flex.refusal(q[..., :8]))


@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize(
    ("cached", "bidirectional", "pinned"),
    [(0, False, 0), (256, False, 0), (0, True, 0), (0, False, 4), (256, False, 4)],
)
def test_flex_skips_only_blocks_without_pairs(
    window: int | None, cached: int, bidirectional: bool, pinned: int
) -> None:
    layout = Layout.packed([[10, 300, 90], [600], [5, 5, 5]], 640)
    query_document, position = layout.document.flatten(), layout.position.flatten()
    slot_document = torch.randint(-1, 6, (cached,))
    slot_document[slot_document < 0] = -2  # an empty slot
    key_document = torch.cat([slot_document, torch.where(query_document < 0, -2, query_document)])
    key_position = torch.cat([torch.full((cached,), -1), position])
    kept = key_position < pinned if pinned else None
    needed = needed_blocks(query_document, key_document, cached, window, bidirectional, kept)
    distance = position[:, None] - key_position
    pairs = (query_document[:, None] == key_document) & ((distance >= 0) | bidirectional)
    if window is not None:
        pairs &= (distance.abs() < window) | (key_position < pinned)
    blocks = pairs.view(needed.shape[0], flex.BLOCK, needed.shape[1], flex.BLOCK).any(3).any(1)
    assert (needed | ~blocks).all()
    assert needed.sum() < needed.numel() / (1 if cached or bidirectional else 2)


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_flash_call(monkeypatch: pytest.MonkeyPatch, bidirectional: bool, window: int | None, layout_name: str) -> None:
    """The package's functions are played by dense attention with their own window convention."""
    layout = LAYOUTS[layout_name]()

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int]
    ) -> Tensor:
        assert causal != bidirectional
        back, ahead = window_size
        assert ahead == (back if bidirectional else 0)
        mask = visible_pairs(None, q.shape[0], q.shape[1], None if back < 0 else back + 1, not causal)
        return dense(q, k, v, mask, softmax_scale)

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        assert cu_q.dtype == torch.int32
        assert (cu_q.diff() <= max_q).all()
        assert cu_q[0] == 0
        assert cu_q[-1] == q.shape[0]
        parts = [
            flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0]
            for a, b in zip(cu_q.tolist(), cu_q[1:].tolist(), strict=False)
            if a < b
        ]
        return torch.cat(parts)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q, k, v = (tensor.detach() for tensor in inputs())
    y = flash_path.forward(q, k, v, layout, window, 0.3, bidirectional)
    mask = visible_pairs(layout, 3, LENGTH, window, bidirectional)
    torch.testing.assert_close(y, dense(q, k, v, mask, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("head_dim", [32, 8])
def test_gpu_matches_the_definition(bidirectional: bool, window: int | None, layout_name: str, head_dim: int) -> None:
    layout = LAYOUTS[layout_name]()
    leaves = inputs(head_dim=head_dim)
    expected = dense(*leaves, visible_pairs(layout, 3, LENGTH, window, bidirectional))
    on_gpu = [leaf.detach().float().cuda().requires_grad_() for leaf in leaves]
    on_device = None if layout is None else layout.to("cuda")
    y = attention(*on_gpu, window=window, bidirectional=bidirectional, layout=on_device)
    weight = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).sin()
    found = torch.autograd.grad((y * weight).sum(), on_gpu)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    for gradient, wanted in zip(found, gradients(expected, leaves), strict=True):
        torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "capacity", "pinned"), [(None, 120, 0), (8, 8, 0), (8, 11, 3)])
def test_gpu_cache_and_step(window: int | None, capacity: int, pinned: int) -> None:
    new, seen = 20, [0, 5, 40]
    history = [tensor.detach().float() for tensor in inputs(head_dim=32, length=61)]
    mask = pinned_pairs(pinned, 61, window or 61).expand(3, -1, -1)
    expected = dense(*(tensor.double() for tensor in history), mask)
    cache = [tensor.cuda() for tensor in caches_of(history[1], history[2], seen, capacity, pinned)]
    chunk = [torch.stack([t[row, count : count + new] for row, count in enumerate(seen)]).cuda() for t in history]
    options = {"window": window, "pinned": pinned}
    y = attention(*chunk, **options, key_cache=cache[0], value_cache=cache[1], position=cache[2])
    caches = append_to_cache(*cache, chunk[1], chunk[2], pinned=pinned, wraps=window is not None)
    token = [torch.stack([t[row, count + new] for row, count in enumerate(seen)]).cuda() for t in history]
    y_t = attention_step(*token, *(cache.contiguous() for cache in caches[:2]), caches[2], **options)
    for row, count in enumerate(seen):
        wanted = expected[row, count : count + new + 1]
        torch.testing.assert_close(y[row].cpu().double(), wanted[:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y_t[row].cpu().double(), wanted[-1], rtol=1e-4, atol=1e-4)


# ---- rotary


def test_rotary_pairs_halves_and_keeps_the_rest() -> None:
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64)
    position = torch.tensor([0, 1, 7, 1000, 20000])
    y = rotary(x, *rotary_tables(position, 6, base=100.0, dtype=torch.float64))
    for index, at in enumerate(position.tolist()):
        for pair in range(3):
            turned = torch.complex(x[:, index, :, pair], x[:, index, :, pair + 3]) * complex(
                math.cos(at * 100 ** (-pair / 3)), math.sin(at * 100 ** (-pair / 3))
            )
            torch.testing.assert_close(y[:, index, :, pair], turned.real, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(y[:, index, :, pair + 3], turned.imag, rtol=1e-10, atol=1e-10)
    assert torch.equal(y[..., 6:], x[..., 6:])
    assert rotary(x.bfloat16(), *rotary_tables(position, 6)).dtype == torch.bfloat16


def test_positions_count_from_the_first_real_token() -> None:
    layout = Layout.left_padded([2, 4])
    x = torch.zeros(2, 4, 1)
    assert token_positions(x, None, layout).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert token_positions(x, torch.tensor([10, 5]), layout)[:, 2:].tolist() == [[10, 11], [7, 8]]
    assert token_positions(x, torch.tensor([10, 5])).tolist() == [[10, 11, 12, 13], [5, 6, 7, 8]]
    assert token_positions(x).tolist() == [0, 1, 2, 3]


# ---- bad input


def test_refusals() -> None:
    q, k, v = (tensor.detach() for tensor in inputs(length=6))
    cache = torch.zeros(3, 2, 8, 8, dtype=torch.float64)
    position = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="window is 0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="do not fit together"):
        attention(q, k[:, 1:], v)
    with pytest.raises(ValueError, match="expected \\(batch, length, heads, head_dim\\)"):
        attention(q[0], k[0], v[0])
    with pytest.raises(TypeError, match="one floating-point dtype"):
        attention(q, k.float(), v)
    with pytest.raises(ValueError, match="go together"):
        attention(q, k, v, key_cache=cache)
    with pytest.raises(ValueError, match="caches have shapes"):
        attention(q, k, v, key_cache=cache, value_cache=cache[:2], position=position)
    with pytest.raises(ValueError, match="position is"):
        attention(q, k, v, key_cache=cache, value_cache=cache, position=position.int())
    with pytest.raises(ValueError, match="8 slots for a window of 4"):
        attention(q, k, v, window=4, key_cache=cache, value_cache=cache, position=position)
    with pytest.raises(ValueError, match="8 slots for a window of 4 beside 3 pinned tokens; expected at most 7"):
        attention(q, k, v, window=4, pinned=3, key_cache=cache, value_cache=cache, position=position)
    with pytest.raises(ValueError, match="pinned is -1; expected a number of tokens"):
        attention(q, k, v, window=4, pinned=-1)
    with pytest.raises(ValueError, match="pinned is 2, but bidirectional attention pins no tokens"):
        attention(q, k, v, window=4, pinned=2, bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional attention takes no caches"):
        attention(q, k, v, bidirectional=True, key_cache=cache, value_cache=cache, position=position)
    with pytest.raises(ValueError, match="6 tokens after 3 do not fit a cache of 8"):
        append_to_cache(cache, cache, position + 3, k, v, wraps=False)
    for backend in ("triton", "cuda"):
        with seqmodels.backend(backend), pytest.raises(BackendUnavailable, match="q is on 'cpu'"):
            attention(q, k, v, window=3)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_a_full_cache_refuses_a_step_and_stays_whole(backend: str) -> None:
    q, k, v = (tensor.detach()[:, 0].float() for tensor in inputs(length=1))
    caches = [torch.randn(3, 2, 8, 8) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    with seqmodels.backend(backend), pytest.raises(ValueError, match=r"cache (of|holds) 8"):
        attention_step(q, k, v, *caches, torch.tensor([7, 8, 3]))
    if backend != "reference":
        assert torch.equal(caches[0], before[0])
    with pytest.raises(ValueError, match="not contiguous"):
        attention_step(
            q, k, v, caches[0].transpose(0, 1).contiguous().transpose(0, 1), caches[1], torch.zeros(3).long()
        )
