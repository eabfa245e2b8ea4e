"""Sparse global attention against a dense softmax with the bias matrix of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import seqmodels
from seqmodels.layout import Layout
from seqmodels.mixers import SparseGlobalAttention
from seqmodels.ops.sparse_attention import advance, empty, select_globals, sparse_attention, sparse_attention_step
from seqmodels.testing import LawViolation, check_law

BACKENDS = ["reference", "torch", "auto"]


def dense(q, k, v, scores, window, num_globals, block):
    """All pairs: a (length, length) matrix of biases, 0 for local keys, log sigmoid(s_j) for chosen ones."""
    batch, length, heads, width = q.shape
    bias = torch.full((batch, length, length), float("-inf"), dtype=q.dtype)
    rows = []
    for b in range(batch):
        for t in range(length):
            before = t // block * block
            order = sorted(range(before), key=lambda j: (-scores[b, j].item(), j))[:num_globals]
            row = [
                torch.zeros_like(scores[b, 0])
                if t - window < j <= t
                else (logsigmoid(scores[b, j]) if j in order else bias[b, t, j])
                for j in range(length)
            ]
            rows.append(torch.stack(row))
    bias = torch.stack(rows).view(batch, 1, length, length)
    repeat = heads // k.shape[2]
    keys, values = (x.repeat_interleave(repeat, dim=2).transpose(1, 2) for x in (k, v))
    logits = q.transpose(1, 2) @ keys.mT / math.sqrt(width) + bias
    return (logits.softmax(-1) @ values).transpose(1, 2)


def inputs(length, *, batch=2, heads=4, kv_heads=2, width=6, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    scores = draw(batch, length)
    if ties:
        scores = scores.round().clamp(-1, 1)
    tensors = (
        draw(batch, length, heads, width), draw(batch, length, kv_heads, width), draw(batch, length, kv_heads, width),
        scores,
    )  # fmt: skip
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("length", "window", "num_globals", "block", "ties"),
    [
        (15, 5, 4, 4, True),
        (13, 7, 0, 3, False),  # the window alone
        (14, 6, 100, 5, False),  # every earlier block
        (4, 9, 3, 8, False),  # shorter than a block
        (11, 4, 3, 1, True),  # every token its own block
        (16, 4, 5, 4, False),  # whole blocks
    ],
)
def test_equals_dense_softmax_with_gradients(backend, length, window, num_globals, block, ties):
    tensors = inputs(length, ties=ties)
    expected = dense(*tensors, window, num_globals, block)
    with seqmodels.backend(backend):
        y = sparse_attention(*tensors, window=window, num_globals=num_globals, block=block)
    # float64 sums of at most 32 terms of size about 1.
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    used = tensors[: 3 if num_globals == 0 else 4]  # without globals nothing reads the scores
    found, wanted = (torch.autograd.grad(out, used, grad, materialize_grads=True) for out in (y, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_everything_is_full_causal_attention(backend):
    q, k, v, scores = inputs(20, kv_heads=4)
    with seqmodels.backend(backend):
        y = sparse_attention(q, k, v, scores, window=20, num_globals=3, block=4)
    full = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(y, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("splits", [(5, 6, 12), (8, 8, 7), (1, 1, 21), (5, 1, 1, 16), (23,)])
def test_choices_are_the_same_in_pieces_token_by_token_and_whole(splits):
    """The chosen positions, not only what they give: prefill, pieces and decode agree."""
    window, num_globals, block = 6, 4, 4
    q, k, v, scores = (x.detach() for x in inputs(23, ties=True))
    _, chosen = select_globals(scores, num_globals=num_globals, block=block)
    chosen = chosen[: 2 * 6].view(2, 6, num_globals)  # the last slots are spare
    sizes = dict(window=window, num_globals=num_globals, block=block, dtype=torch.float64)
    whole, pieces = advance(empty(2, 2, 6, **sizes), k, v, scores), empty(2, 2, 6, **sizes)
    start = 0
    for size in splits:
        part = slice(start, start + size)
        pieces, start = advance(pieces, k[:, part], v[:, part], scores[:, part]), start + size
        assert torch.equal(pieces.global_position, chosen[:, start // block])
        assert torch.equal(pieces.recent_score[:, : start % block], scores[:, start // block * block : start])
    stepped = empty(2, 2, 6, **sizes)
    for t in range(23):
        assert torch.equal(stepped.global_position, chosen[:, t // block])
        sparse_attention_step(q[:, t], k[:, t], v[:, t], scores[:, t], stepped)
    for name, one, two, three in zip(whole._fields, whole, pieces, stepped, strict=True):
        assert torch.equal(one, two), name
        assert torch.equal(one, three), name


def test_no_later_token_changes_a_choice():
    scores = inputs(40)[3].detach()
    token, chosen = select_globals(scores, num_globals=3, block=4)
    changed = scores.clone()
    changed[:, 17:] += 100  # would win everywhere if it could
    _, after = select_globals(changed, num_globals=3, block=4)
    block_of = token.amax(1) % 40 // 4
    early = (block_of <= 17 // 4) & (token >= 0).any(1)
    assert torch.equal(chosen[early], after[early])
    assert not torch.equal(chosen, after)


class ChoosesFromTheWholeSequence(SparseGlobalAttention):
    """The rule that leaks: one choice for all queries, so that a later token pushes an earlier one out."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        out = super().forward(x, state, layout=layout, return_state=return_state)
        best = self.scores(x).topk(min(self.num_globals, x.shape[1]), dim=1).indices
        values = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        seen = best[:, None, :] <= torch.arange(x.shape[1])[:, None]  # the causal mask alone does not help
        return out._replace(y=out.y + seen.to(x.dtype) @ values)


def test_the_causality_law_catches_a_choice_over_the_whole_sequence():
    arguments = dict(d_model=16, num_heads=2, window=6, num_globals=3, block=4)
    check_law("causality", SparseGlobalAttention, **arguments)
    with pytest.raises(LawViolation, match="causality"):
        check_law("causality", ChoosesFromTheWholeSequence, **arguments)


def test_packed_documents_and_padding():
    tensors = [x.detach() for x in inputs(20, batch=1)]
    layout = Layout.packed([[7, 11]], 20)
    y = sparse_attention(*tensors, window=5, num_globals=3, block=4, layout=layout)
    for start, stop in ((0, 7), (7, 18)):
        alone = sparse_attention(*(x[:, start:stop] for x in tensors), window=5, num_globals=3, block=4)
        torch.testing.assert_close(y[:, start:stop], alone, rtol=1e-12, atol=1e-12)
    assert y[:, 18:].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_nan(backend):
    """Left padding puts it where gathers of "no token" would read: the first row."""
    layout = Layout.left_padded([9, 5], 13)
    tensors = [x.detach() for x in inputs(13)]
    for x in tensors:
        x[~layout.valid] = float("nan")
    tensors = [x.requires_grad_() for x in tensors]
    with seqmodels.backend(backend):
        y = sparse_attention(*tensors, window=5, num_globals=3, block=4, layout=layout)
        grads = torch.autograd.grad(y.square().sum(), tensors)
        alone = sparse_attention(*(x[1:, 8:] for x in tensors), window=5, num_globals=3, block=4)
    torch.testing.assert_close(y[1:, 8:], alone, rtol=1e-12, atol=1e-12)
    for x in (y, *grads):
        assert x[~layout.valid].abs().max() == 0
        assert x.isfinite().all()


def test_memory_grows_linearly():
    """All that a forward and backward allocate: at twice the length twice as much (a square would be four times)."""

    def allocated(length: int) -> int:
        q, k, v, scores = (x.detach().float().requires_grad_() for x in inputs(length, batch=1, heads=2, width=8))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            sparse_attention(q, k, v, scores, window=128, num_globals=64, block=64).sum().backward()
        return sum(max(event.self_cpu_memory_usage, 0) for event in record.events())

    small, large = allocated(1024), allocated(2048)
    # The first blocks have fewer keys, and the prefix scan of the choices takes log2(blocks) rounds: 6 beside 5.
    assert large <= 2 * 6 / 5 * small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=3, num_globals=2, block=4), "window is 3 and block 4; expected a window of at least a block"),
        (dict(window=4, num_globals=-1, block=4), "num_globals -1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse_attention(*inputs(8), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=8, block=16), "window is 8 and block 16; expected a window of at least a block"),
        (dict(window=8, block=8, num_globals=-1), "num_globals is -1; expected 0"),
        (dict(block=0), "block"),
    ],
)
def test_errors_of_the_layer(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseGlobalAttention(8, num_heads=2, **arguments)


def test_scores_stay_out_of_half_precision():
    with pytest.raises(TypeError, match=r"scores are torch\.bfloat16; expected torch\.float32"):
        sparse_attention(*(x.detach().bfloat16() for x in inputs(8)), window=4, num_globals=2, block=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_keeps_its_digits_beside_bfloat16_keys(backend):
    """One chosen key of logit 20 and bias -20.3, and the token itself of logit 0. Rounded to bfloat16, -20.3 / scale
    would be -40.5 and y 0.4378."""
    q, k, v = torch.zeros(3, 1, 2, 1, 4, dtype=torch.bfloat16)
    q[:, 1, :, 0], k[:, 0, :, 0], v[:, 0] = 8.0, 5.0, 1.0
    scores = torch.tensor([[-20.3, 0.0]])
    with seqmodels.backend(backend):
        y = sparse_attention(q, k, v, scores, window=1, num_globals=1, block=1)[0, 1]
    expected = torch.full((1, 4), 1 / (1 + math.exp(0.3)))
    # The weight and the output are rounded to bfloat16, 2^-9 each.
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_alone_is_scored_bit_for_bit_as_in_a_sequence(dtype):
    torch.manual_seed(0)
    layer = SparseGlobalAttention(96, num_heads=2, window=8, num_globals=4, block=4, dtype=dtype)
    x = torch.randn(3, 37, 96, dtype=dtype)
    together = layer.scores(x)
    # A sum of 96 float32 products of size about 1 / 10.
    expected = (x.double() * layer.score_weight.double()).sum(-1) + layer.score_bias.double()
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(together, layer.scores(x.mT.contiguous().mT))  # whatever its strides
    for t in range(37):
        assert torch.equal(together[:, t], layer.scores(x[:, t]))
