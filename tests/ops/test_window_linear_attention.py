"""Window attention over a linear past: every form against its definition, written here once more in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import seqmodels
from seqmodels import Layout, backends
from seqmodels.ops import extension
from seqmodels.ops.window_linear_attention import (
    evicted_tokens,
    window_linear_attention,
    window_linear_attention_step,
)

HEADS, GROUPS, WIDTH, VALUE = 4, 2, 5, 3
NAMES = ("q", "k", "v", "past", "factor", "key_cache", "value_cache")
LAYOUTS = {
    "dense": None,
    "packed": Layout.packed([[1, 30, 2], [33], [12, 13]], 40, capacity=8),
    "left padded": Layout.left_padded([37, 1, 20], 40),
}


def inputs(layout: Layout | None, window: int, *, cached: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Values exact in ``dtype``, held in float64; NaN on padding."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).double()

    rows, length = 3, 40
    documents = rows if layout is None else layout.num_documents
    past = draw(rows, length, HEADS, VALUE + 1)
    past[..., -1] = past[..., -1].abs()
    found = [
        draw(rows, length, HEADS, WIDTH),
        draw(rows, length, GROUPS, WIDTH),
        draw(rows, length, GROUPS, VALUE),
        past,
    ]
    if layout is not None:
        for tensor in found:
            tensor[~layout.valid] = float("nan")
    found.append(torch.rand(HEADS).double())
    if cached:
        found += [draw(documents, GROUPS, window, width) for width in (WIDTH, VALUE)]
        found.append(torch.tensor([0, 1, 3, 200, window, window - 1, 17, 5][:documents]))
    return found


def run(arguments: list[Tensor], window: int, layout: Layout | None) -> Tensor:
    q, k, v, past, factor, *rings = arguments
    named = dict(zip(("key_cache", "value_cache", "position"), rings, strict=False))
    return window_linear_attention(q, k, v, past, factor, window=window, layout=layout, **named)


def by_loops(arguments: list[Tensor], window: int, layout: Layout | None) -> Tensor:
    """One query and head at a time, from the equation in the docstring."""
    q, k, v, past, factor, *rings = arguments
    y = torch.zeros(*q.shape[:3], VALUE, dtype=torch.float64)
    layout = Layout.full(*q.shape[:2]) if layout is None else layout
    for row, column in layout.valid.nonzero().tolist():
        document, at = int(layout.document[row, column]), int(layout.position[row, column])
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            keys, values = [], []
            for back in range(window):
                if back <= at:
                    keys.append(k[row, column - back, group])
                    values.append(v[row, column - back, group])
                elif rings and at - back + int(rings[2][document]) >= 0:
                    slot = (at - back + int(rings[2][document])) % window
                    keys.append(rings[0][document, group, slot])
                    values.append(rings[1][document, group, slot])
            scores = torch.stack([key @ q[row, column, head] for key in keys]) / math.sqrt(WIDTH)
            weights = factor[head] * (scores - scores.max()).exp()
            numerator = weights @ torch.stack(values) + past[row, column, head, :-1]
            y[row, column, head] = numerator / (weights.sum() + past[row, column, head, -1])
    return y


@pytest.mark.parametrize("cached", [False, True], ids=["new", "carried"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("window", [1, 7, 64])
def test_forms_are_the_definition(window, layout, cached):
    arguments = inputs(layout, window, cached=cached)
    expected = by_loops(arguments, window, layout)
    for backend in ("reference", "torch"):
        with seqmodels.backend(backend):
            found = run(arguments, window, layout)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("window", [1, 33])
def test_gradients_are_those_of_the_definition(window, layout):
    """With cotangents at padding too, which must reach nothing."""
    arguments = inputs(layout, window, cached=True)
    found = {}
    for backend in ("reference", "torch"):
        leaves = [x.clone().requires_grad_() for x in arguments[:-1]]
        with seqmodels.backend(backend):
            y = run([*leaves, arguments[-1]], window, layout)
            torch.manual_seed(1)
            found[backend] = torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves)
    for name, one, other in zip(NAMES, found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert layout is None or one.shape[:2] != (3, 40) or (one[~layout.valid] == 0).all(), name


def test_definition_passes_gradcheck():
    layout = Layout.packed([[3, 4]], 8)
    q, k, v, past, factor, *rings = inputs(None, 3, cached=True)
    small = [q[:1, :8], k[:1, :8], v[:1, :8], past[:1, :8], factor, rings[0][:2], rings[1][:2]]
    leaves = [x.clone().requires_grad_() for x in small]
    with seqmodels.backend("reference"):
        torch.autograd.gradcheck(lambda *x: run([*x, rings[2][:2]], 3, layout), leaves)


def test_equal_largest_scores_share_the_gradient():
    """The gradient of c_i, which does not cancel beside a past, goes to every key that attains it."""
    q, k, v, past, factor = inputs(None, 8, cached=False)
    k[:, 1::2] = k[:, ::2]
    gradients = []
    for backend in ("reference", "torch"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, past, factor)]
        with seqmodels.backend(backend):
            gradients.append(torch.autograd.grad(run(leaves, 8, None).square().sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Law 5's bound: twice the reference's error in the same precision, plus 4 eps of the group's largest value.

    Over five draws, since ``factor`` has four entries, and the largest error of four is a matter of luck.
    """
    errors, low_errors, sizes = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    for seed in range(5):
        torch.manual_seed(seed)
        arguments = inputs(None, 16, cached=True, dtype=dtype)
        low = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
        low[3], low[4] = arguments[3].float(), arguments[4].float()
        exact = [*arguments[:3], low[3].double(), low[4].double(), *arguments[5:]]
        weight = torch.randn(3, 40, HEADS, VALUE).to(dtype)
        results = {}
        for name, backend, given in (("exact", "reference", exact), ("low", "reference", low), ("torch", "torch", low)):
            leaves = [x.clone().requires_grad_() for x in given[:-1]]
            with seqmodels.backend(backend):
                y = run([*leaves, given[-1]], 16, None)
            results[name] = [y.detach(), *torch.autograd.grad((y * weight.to(y.dtype)).sum(), leaves)]
        for index, (truth, one, other) in enumerate(zip(*results.values(), strict=True)):
            assert one.dtype == other.dtype
            low_errors[index] = max(low_errors[index], (one.double() - truth).abs().max())
            errors[index] = max(errors[index], (other.double() - truth).abs().max())
            sizes[index] = max(sizes[index], truth.abs().max())
    sizes[1:] = sizes[1:].max()  # gradients are one group
    assert (errors <= 2 * low_errors + 4 * torch.finfo(dtype).eps * sizes).all(), (errors, low_errors)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_steps_are_the_sequence(backend):
    """From rings that have seen unequal numbers of tokens; outputs and rings."""
    window = 4
    q, k, v, past, factor, key_ring, value_ring, position = inputs(None, window, cached=True)
    expected = by_loops([q, k, v, past, factor, key_ring, value_ring, position], window, None)
    key_ring, value_ring, position = key_ring.clone(), value_ring.clone(), position.clone()
    with seqmodels.backend(backend):
        for t in range(12):
            y = window_linear_attention_step(
                q[:, t], k[:, t], v[:, t], past[:, t], factor, key_ring, value_ring, position
            )
            torch.testing.assert_close(y, expected[:, t], rtol=1e-12, atol=1e-12)
            position += 1
    for row, seen in enumerate(position.tolist()):
        for back in range(window):
            assert torch.equal(key_ring[row, :, (seen - 1 - back) % window], k[row, 11 - back])


@pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width", "window"), [(4, 2, 5, 7), (3, 3, 64, 64), (2, 1, 20, 300)])
def test_cpu_step(heads, groups, width, window, dtype, level):
    """Against the float64 definition: at most twice the plain form's error in the same precision, plus rounding."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    q, k, v = draw(3, heads, width), draw(3, groups, width), draw(3, groups, width)
    past, factor = torch.randn(3, heads, width + 1), torch.rand(heads)
    past[..., -1].abs_()
    rings = draw(3, groups, window, width), draw(3, groups, window, width)
    position = torch.tensor([0, 5, 1000])
    wide = [x.double() for x in (q, k, v, past, factor, *rings)]
    results = {}
    with extension.capability(level):
        for name, backend, given in (
            ("exact", "reference", wide), ("low", "torch", (q, k, v, past, factor, *rings)),
            ("cpp", "cpu", (q, k, v, past, factor, *rings)),
        ):  # fmt: skip
            own = [x.clone() for x in given]
            with seqmodels.backend(backend):
                results[name] = [window_linear_attention_step(*own, position), *own[5:]]
    for exact, low, found in zip(results["exact"], results["low"], results["cpp"], strict=True):
        assert found.dtype == dtype
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= 2 * (low.double() - exact).abs().max() + floor
    for ring, low in zip(results["cpp"][1:], results["low"][1:], strict=True):
        assert torch.equal(ring, low)


@pytest.mark.skipif(backends.missing("cpu") is not None, reason="the C++ extension is not built")
def test_cpu_step_refuses_what_it_cannot_do():
    token = [torch.randn(1, 2, width) for width in (4, 4, 3)]
    rest = [torch.rand(1, 2, 4), torch.rand(2), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3), torch.tensor([1])]
    with seqmodels.backend("cpu"), pytest.raises(seqmodels.BackendUnavailable, match="values as wide as queries"):
        window_linear_attention_step(*token, *rest)


def test_a_window_over_the_document_is_softmax_for_every_factor():
    q, k, v, past, _ = inputs(None, 40, cached=False)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    for factor in (1e-6, 0.1, 1.0, 50.0):
        y = run([q, k, v, torch.zeros_like(past), torch.full((HEADS,), factor).double()], 40, None)
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)


def test_nothing_left_gives_zero_and_large_scores_are_finite():
    q, k, v, past, factor = (x.float() for x in inputs(None, 4, cached=False))
    assert (run([q, k, v, torch.zeros_like(past), torch.zeros_like(factor)], 4, None) == 0).all()
    leaves = [x.requires_grad_() for x in (1e4 * q, 1e4 * k, v, past, factor)]
    y = run(leaves, 4, None)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), leaves))


def test_evicted_tokens_are_those_a_window_ago():
    """Packed, from rings with unequal counts: by loops over absolute positions."""
    window, layout = 4, LAYOUTS["packed"]
    _, k, v, _, _, key_ring, value_ring, position = inputs(layout, window, cached=True)
    old_k, old_v = evicted_tokens(
        k, v, window=window, layout=layout, key_cache=key_ring, value_cache=value_ring, position=position
    )
    for row in range(3):
        for column in range(40):
            document, at = int(layout.document[row, column]), int(layout.position[row, column])
            expected = torch.zeros(GROUPS, WIDTH + VALUE + 1, dtype=torch.float64)
            if document >= 0 and at + int(position[document]) >= window:
                slot = (at + int(position[document])) % window
                source = (k[row, column - window], v[row, column - window]) if at >= window else (
                    key_ring[document, :, slot], value_ring[document, :, slot])  # fmt: skip
                expected = torch.cat([*source, torch.ones(GROUPS, 1)], dim=-1)
            found = torch.cat([old_k[row, column], old_v[row, column]], dim=-1)
            assert torch.equal(found, expected), (row, column)


def test_memory_is_linear_in_the_length():
    """No tensor of the forward or backward has more elements than the inputs and a row, or a group of blocks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from seqmodels.ops.window_linear_attention import torch as blocked

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    def largest(length: int) -> int:
        q, k, v = (torch.randn(1, length, 2, 8) for _ in range(3))
        past, factor = torch.rand(1, length, 2, 9), torch.rand(2)
        rest = (None, None, None, None, None, 16, 0.3)
        with Largest() as seen:
            y, divisor = blocked.forward(q, k, v, past, factor, *rest)
            blocked.backward(y, q, k, v, past, factor, *rest, y, divisor)
        return seen.elements

    assert largest(32768) <= max(blocked._SCORES, 32769 * 2 * 9) < 32768 * 32768 / 1000


def test_registered_op_passes_opcheck():
    q, k, v, past, factor, *rings = (x.float() if x.is_floating_point() else x for x in inputs(None, 4, cached=True))
    leaves = [x.requires_grad_() for x in (q, k, v, past, factor, *rings[:2])]
    op = torch.ops.seqmodels.window_linear_attention.default
    torch.library.opcheck(op, (*leaves, rings[2], None, None, 4, 0.5, "auto"))
    # One slot: rings whose transposes are contiguous, so that a view would alias the tokens' gradient.
    q, k, v, past, factor, *rings = (x.float() if x.is_floating_point() else x for x in inputs(None, 1, cached=True))
    leaves = [x.requires_grad_() for x in (q, k, v, past, factor, *rings[:2])]
    y, divisor = op(*leaves, rings[2], None, None, 1, 0.5, "auto")
    backward = torch.ops.seqmodels.window_linear_attention_backward.default
    values = (torch.ones_like(y), *leaves, rings[2], None, None, 1, 0.5, y, divisor, "auto")
    torch.library.opcheck(backward, tuple(x.detach() if isinstance(x, Tensor) else x for x in values))


def replaced(**changes) -> list[Tensor]:
    arguments = dict(zip((*NAMES, "position"), inputs(None, 4, cached=True), strict=True))
    return list({**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q=torch.randn(3, 40, 3, WIDTH).double()), ValueError, "3 query heads are not a multiple of 2 key heads"),
        (dict(k=torch.randn(3, 40, 2, 4).double()), ValueError, "do not fit together; expected one head width"),
        (dict(v=torch.randn(3, 39, 2, VALUE).double()), ValueError, "v has shape"),
        (dict(past=torch.randn(3, 40, HEADS, VALUE).double()), ValueError, "one for the normaliser"),
        (dict(factor=torch.rand(2).double()), ValueError, "one for each head"),
        (dict(v=torch.randn(3, 40, 2, VALUE)), TypeError, "expected one floating-point dtype"),
        (dict(key_cache=torch.randn(3, 2, 5, WIDTH).double()), ValueError, r"key_cache is \(3, 2, 5, 5\)"),
        (dict(position=torch.zeros(3)), ValueError, r"expected \(3,\) torch.int64"),
    ],
)
def test_bad_inputs(changes, error, message):
    with pytest.raises(error, match=message):
        run(replaced(**changes), 4, None)


def test_bad_windows_layouts_and_rings():
    arguments = inputs(None, 4, cached=True)
    with pytest.raises(ValueError, match="window is 0"):
        run(arguments[:5], 0, None)
    with pytest.raises(ValueError, match="go together"):
        run(arguments[:6], 4, None)
    with pytest.raises(ValueError, match=r"layout is for a grid of \(2, 40\)"):
        run(arguments[:5], 4, Layout.full(2, 40))
    q, k, v, past, factor, key_ring, value_ring, position = arguments
    token = (q[:, 0], k[:, 0], v[:, 0], past[:, 0], factor)
    with pytest.raises(ValueError, match="a ring is not contiguous"):
        window_linear_attention_step(
            *token, key_ring.transpose(2, 3).contiguous().transpose(2, 3), value_ring, position
        )
