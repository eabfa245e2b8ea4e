"""The C++ kernels of attention over few tokens against float64, at every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import seqmodels
from seqmodels.ops import extension
from seqmodels.ops.attention import attention
from seqmodels.ops.attention import cpu as kernels

pytestmark = [
    pytest.mark.skipif(extension.load() is not None, reason=str(extension.load())),
    pytest.mark.skipif(not kernels.VECTORS, reason="other machines use PyTorch's kernels"),
]
UNIT = 2.0**-24  # largest relative error of one float32 operation
# batch, length, heads, key heads, head width: one token, partial tiles and vectors, grouped heads, several vectors
SHAPES = [(2, 1, 2, 1, 8), (3, 17, 4, 2, 20), (2, 77, 2, 2, 33), (1, 130, 3, 1, 5), (2, 64, 1, 1, 64)]


def problem(batch: int, length: int, heads: int, groups: int, width: int) -> tuple[Tensor, ...]:
    """q, k and v with gaps between tokens, as one projection leaves them, and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, length, heads + 2 * groups, width, generator=generator)
    grad = torch.randn(batch, heads, length, width, generator=generator).transpose(1, 2)
    return *fused.split((heads, groups, groups), 2), grad


def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with seqmodels.backend(backend):
        y = attention(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def truth_and_bounds(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """In float64: y and the gradients, and how far rounding to float32 at each operation can move them.

    A sum of n products is off by at most n units of the sum of their sizes. So a score is off by ``score``; a weight,
    relatively, by twice the largest of its row, the sum over the row, and an exponential and a few single operations
    (within 20); the rest follows the equations, each factor at its largest.
    """
    heads = torch.arange(q.shape[2]) * k.shape[2] // q.shape[2]
    q, k, v, grad = (x.double().transpose(1, 2) for x in (q, k[:, :, heads], v[:, :, heads], grad))
    length, width = q.shape[2:]
    scale = 1 / math.sqrt(width)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    scores = scale * q @ k.mT
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)
    score = (width + 4) * UNIT * scale * (q.abs() @ k.abs().mT).masked_fill(~seen, 0).amax(-1, keepdim=True)
    weight = 4 * score + (2 * length + 20) * UNIT
    products, sizes = grad @ v.mT, grad.abs() @ v.abs().mT
    g = scale * p * (products - (p * products).sum(-1, keepdim=True))
    g_size = scale * p * (sizes + (p * sizes).sum(-1, keepdim=True))
    g_off = g_size * (2 * weight + (width + 2 * length + 4) * UNIT)
    p_off = p * (weight + length * UNIT)
    found = [
        (p @ v, p_off @ v.abs()),
        (g @ k, g_off @ k.abs()),
        (g.mT @ q, g_off.mT @ q.abs()),
        (p.mT @ grad, p_off.mT @ grad.abs()),
    ]
    groups = int(heads[-1]) + 1

    def gathered(x: Tensor) -> Tensor:
        """Key heads gather from the query heads that read them."""
        return x.unflatten(1, (groups, -1)).sum(2)

    found[2:] = [(gathered(value), gathered(bound)) for value, bound in found[2:]]
    return [(value.transpose(1, 2), bound.transpose(1, 2)) for value, bound in found]


def excess(shape: tuple[int, ...], actual: list[Tensor]) -> float:
    """The largest error over its bound."""
    pairs = zip(actual, truth_and_bounds(*problem(*shape)), strict=True)
    return max(float(((x - value).abs() / (bound + 1e-30)).max()) for x, (value, bound) in pairs)


@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_rounding_of_float64(shape, level):
    try:
        with extension.capability(level):
            assert excess(shape, run(*problem(*shape), backend="cpu")) <= 1
    except RuntimeError as reason:
        pytest.skip(str(reason))


def test_the_bound_catches_a_missing_diagonal():
    shape = SHAPES[2]
    q, k, v, grad = problem(*shape)
    shifted = run(q, torch.cat([k[:, :1], k[:, :-1]], 1), v, grad, backend="cpu")
    assert excess(shape, shifted) > 10


def test_both_names_run_the_kernels_and_repeat_their_bits(monkeypatch):
    calls, forward = [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    inputs = problem(*SHAPES[1])
    for one, other in zip(run(*inputs, backend="cpu"), run(*inputs, backend="auto"), strict=True):
        assert torch.equal(one, other)
    run(*inputs, backend="torch")
    run(*(x.double() for x in inputs), backend="auto")
    assert len(calls) == 2


def test_rows_alone_equal_rows_in_a_batch():
    q, k, v, grad = problem(3, 40, 2, 1, 16)
    together = run(q, k, v, grad, backend="cpu")
    alone = [run(*(x[row : row + 1] for x in (q, k, v, grad)), backend="cpu") for row in range(3)]
    for index, whole in enumerate(together):
        assert torch.equal(whole, torch.cat([one[index] for one in alone]))


def test_what_the_kernels_do_not_take():
    q, k, v, _ = problem(*SHAPES[1])
    rest = (None, None, None, None, None, None, 1.0)
    assert kernels.supports(q, k, v, *rest, False, 0) is None
    assert "causal rows" in str(kernels.supports(q, k, v, *rest, True, 0))
    assert "float32" in str(kernels.supports(q.double(), k.double(), v.double(), *rest, False, 0))
    long = torch.empty(1, kernels.LONGEST + 1, 1, 4)
    assert not kernels.fits(long)
    assert kernels.fits(long[:, 1:])


def test_registration():
    q, k, v, _ = problem(2, 9, 2, 1, 4)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    arguments = (*inputs, None, None, None, None, None, None, 0.5, False, 0, "cpu")
    torch.library.opcheck(torch.ops.seqmodels.attention.default, arguments)


def test_a_change_of_length_is_compiled_at_most_twice():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for length in (20, 33, 50, 64):
        q, k, v, _ = problem(2, length, 2, 1, 8)
        assert torch.equal(compiled(q, k, v), attention(q, k, v))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first length, then any
