"""Operator: one registered op over several implementations, its gradient, and what the library's ops promise."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import seqmodels
from seqmodels.ops.registration import Operator, autocast_dtype, cast_inputs, state_dtype


def _module(name, **functions):
    module = types.ModuleType(f"seqmodels_test_registration_{name}")
    vars(module).update(functions)
    sys.modules[module.__name__] = module
    return module.__name__


# y = x a + b with b optional, and the row sums of x a kept for the backward.


def _affine(x, a, b, power):
    product = x * a**power
    y = product if b is None else product + b
    return y, product.sum(-1)


def _affine_backward(grad, x, a, b, power, row_sums):
    _affine_backward.seen = row_sums
    grad_b = grad.new_empty(0) if b is None else grad.sum(0)
    return grad * a**power, (grad * x * power * a ** (power - 1)).sum(0), grad_b


AFFINE = Operator(
    "test_registration_affine", "Tensor x, Tensor a, Tensor? b, int power", outputs=2, residuals=1,
    fake=lambda x, a, b, power: (torch.empty_like(x), x.new_empty(x.shape[0])), differentiable=(0, 1, 2),
    modules={
        "reference": _module("reference", forward=_affine),
        "torch": _module("torch", forward=_affine, backward=_affine_backward),
    },
)  # fmt: skip


def _decay_step(x, state):
    state.mul_(0.5).add_(x)
    return state * 2


DECAY_STEP = Operator(
    "test_registration_decay_step", "Tensor x, Tensor(a!) state", outputs=1,
    fake=lambda x, state: torch.empty_like(x), modules={"torch": _module("step", forward=_decay_step)},
)  # fmt: skip

# exp, whose backward wants its own output
EXP = Operator(
    "test_registration_exp", "Tensor x", outputs=1, fake=torch.empty_like, differentiable=(0,), keep_outputs=True,
    modules={"torch": _module("exp", forward=torch.exp, backward=lambda grad, x, y: (grad * y,))},
)  # fmt: skip


def _inputs(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    x, a, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 4), (4,), (4,)))
    return x, a, b if bias else None


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_second_derivative_is_an_error(backend):
    """The backward is an op without a gradient of its own: what autograd would make up is wrong."""
    x, a, b = _inputs()
    with seqmodels.backend(backend):
        (gradient,) = torch.autograd.grad(AFFINE(x, a, b, 3)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="test_registration_affine is differentiable once"):
        torch.autograd.grad(gradient.sum(), a)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradient_equals_autograd(backend, bias):
    x, a, b = _inputs(bias=bias)
    with seqmodels.backend(backend):
        y, residual = AFFINE(x, a, b, 3)
    assert not residual.requires_grad
    wanted = _affine(x, a, b, 3)[0]
    weights = torch.randn_like(y)
    leaves = [leaf for leaf in (x, a, b) if leaf is not None]
    found = torch.autograd.grad((y * weights).sum(), leaves)
    expected = torch.autograd.grad((wanted * weights).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_backward_gets_the_residuals_and_the_backend_of_its_forward():
    x, a, b = _inputs()
    _affine_backward.seen = None
    with seqmodels.backend("torch"):
        y, row_sums = AFFINE(x, a, b, 2)
    with seqmodels.backend("reference"):
        y.sum().backward()
    assert torch.equal(_affine_backward.seen, row_sums)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    x, a, b = _inputs()
    with seqmodels.backend(backend):
        assert torch.autograd.gradcheck(lambda *leaves: AFFINE(*leaves, 3)[0], (x, a, b))


def test_only_what_requires_a_gradient_gets_one():
    x, a, b = _inputs()
    y, _ = AFFINE(x.detach(), a, b.detach(), 2)
    (gradient,) = torch.autograd.grad(y.sum(), [a])
    torch.testing.assert_close(gradient, (2 * a * x).sum(0))
    with torch.no_grad():
        assert not AFFINE(x, a, b, 2)[0].requires_grad


def test_an_argument_without_influence_gets_zeros():
    ignoring = Operator(
        "test_registration_ignoring", "Tensor x, Tensor unused", outputs=1, fake=lambda x, unused: torch.empty_like(x),
        differentiable=(0, 1), modules={"torch": _module("ignoring", forward=lambda x, unused: x * 2)},
    )  # fmt: skip
    x, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    ignoring(x, unused).sum().backward()
    assert unused.grad.tolist() == [0, 0]


def test_kept_outputs_reach_the_backward():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: EXP(x), (x,))


def test_in_place_step_updates_the_state():
    state = torch.ones(3)
    version = state._version
    y = DECAY_STEP(torch.ones(3), state)
    assert state.tolist() == [1.5] * 3
    assert y.tolist() == [3.0] * 3
    assert state._version > version, "autograd and functionalisation rely on the version counter"


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, a, b = _inputs(bias=bias)
    torch.library.opcheck(AFFINE.overload, (x, a, b, 2, "torch"))
    torch.library.opcheck(DECAY_STEP.overload, (torch.ones(3), torch.ones(3), "torch"))
    torch.library.opcheck(EXP.overload, (x, "torch"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_compiles_whole_with_gradients(backend):
    torch._dynamo.reset()
    x, a, b = _inputs()

    def function(x, a, b):
        return (AFFINE(x, a, b, 2)[0].tanh() ** 2).sum()

    with seqmodels.backend(backend):
        found = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x, a, b), (x, a, b))
        expected = torch.autograd.grad(function(x, a, b), (x, a, b))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_code_follows_the_backend_in_force():
    torch._dynamo.reset()
    seen = []
    probe = Operator(
        "test_registration_probe", "Tensor x", outputs=1, fake=torch.empty_like,
        modules={
            name: _module(f"probe_{name}", forward=lambda x, name=name: seen.append(name) or x + 1)
            for name in ("reference", "torch")
        },
    )  # fmt: skip
    compiled = torch.compile(lambda x: probe(x), fullgraph=True, backend="eager")
    for name in ("reference", "torch"):
        with seqmodels.backend(name):
            compiled(torch.zeros(2))
    assert seen == ["reference", "torch"]


def test_autocast_casts_in_front_of_an_op_and_not_inside():
    inside = []
    product = Operator(
        "test_registration_product", "Tensor x, Tensor y", outputs=1,
        fake=lambda x, y: x.new_empty(x.shape[0], y.shape[1]),
        modules={"torch": _module("product", forward=lambda x, y: inside.append((x @ y).dtype) or x @ y)},
    )  # fmt: skip
    x = torch.randn(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16
        product(x, x)
        cast = cast_inputs(x, x)
        assert [tensor.dtype for tensor in cast] == [torch.bfloat16] * 2
        assert cast_inputs(x.double())[0].dtype == torch.float64, "float64 is never lowered"
    assert inside == [torch.float32]
    assert autocast_dtype("cpu") is None
    assert cast_inputs(x)[0] is x


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_state_dtype(dtype, expected):
    assert state_dtype(dtype) == expected


def test_gradients_that_are_not_contiguous():
    """``y.sum()`` hands an expanded gradient down, and a transposed output a transposed one."""
    from seqmodels.backends import missing
    from seqmodels.ops.linear_attention import linear_attention
    from seqmodels.ops.short_conv import short_conv

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 2, 4, requires_grad=True) for _ in range(3))
    x, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    ops = {
        "linear_attention": (lambda: linear_attention(q, k, v)[0], (q, k, v)),
        "short_conv": (lambda: short_conv(x, weight)[0], (x, weight)),
    }
    for backend in ("reference", "torch", "cpu"):
        if missing(backend) is not None:
            continue
        for name, (function, leaves) in ops.items():
            try:
                with seqmodels.backend(backend):
                    y = function()
            except seqmodels.BackendUnavailable:
                continue
            weights = torch.randn(y.shape[::-1]).permute(*range(y.dim() - 1, -1, -1))
            assert not weights.is_contiguous()
            for strange in (torch.ones(()).expand(y.shape), weights):
                found = torch.autograd.grad(y, leaves, strange, retain_graph=True)
                expected = torch.autograd.grad(y, leaves, strange.contiguous(), retain_graph=True)
                for ours, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, msg=f"{name} on {backend}")
