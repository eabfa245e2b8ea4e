"""The linear attention op: registration, compilation, autocast, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from linear_attention_cases import Case, cast
from torch._dynamo.testing import CompileCounterWithBackend

import seqmodels
from seqmodels import Layout, backends
from seqmodels.ops.linear_attention import linear_attention, linear_attention_step

BACKENDS = [name for name in ("reference", "torch", "cpu") if backends.missing(name) is None]
PACKED = Layout.packed([[3, 1], [5]], 5, capacity=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, PACKED])
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(backend, layout, normalize):
    case = Case(length=5, query_groups=1, normalize=normalize, ranks=2)
    case = case if layout is None else case.with_layout(layout)
    inputs = [x.nan_to_num(0.5).requires_grad_() for x in cast(case.inputs(), torch.float32)]
    documents = (None, None) if layout is None else (layout.starts, layout.lengths)
    rest = (*documents, normalize, 1e-6, 64)
    outputs = torch.ops.seqmodels.linear_attention(*inputs, *rest, backend)
    torch.library.opcheck(torch.ops.seqmodels.linear_attention.default, (*inputs, *rest, backend))
    inputs, outputs = [x.detach() for x in inputs], [x.detach() for x in outputs]
    grads = [torch.randn_like(x) for x in outputs[:2]]
    torch.library.opcheck(
        torch.ops.seqmodels.linear_attention_backward.default, (*grads, *inputs, *rest, *outputs, backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_step(backend):
    inputs = cast(Case(normalize=True, ranks=2).inputs(), torch.float32)
    token = [x[:, 0] for x in inputs[:6]]
    torch.library.opcheck(torch.ops.seqmodels.linear_attention_step.default, (*token, inputs[6], True, 1e-6, backend))


def test_a_new_length_or_layout_recompiles_nothing():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(q, k, v, log_decay, layout):
        return linear_attention(q, k, v, log_decay, layout=layout)

    for length, documents in ((7, [[3, 4], [5]]), (12, [[12], [2, 3]]), (33, [[30], [33]]), (18, [[1], [1, 1]])):
        layout = Layout.packed(documents, length, capacity=4)
        q, k, v = (torch.randn(2, length, 2, 4, requires_grad=True) for _ in range(3))
        log_decay = -torch.rand(2, length, 2)
        y, state = function(q, k, v, log_decay, layout)
        compiled = torch.autograd.grad(y.square().sum() + state.sum(), (q, k, v))
        wanted, state = linear_attention(q, k, v, log_decay, layout=layout)
        torch.testing.assert_close(y, wanted)
        for a, b in zip(compiled, torch.autograd.grad(wanted.square().sum() + state.sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # the first length, and all others


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_no_decay_and_no_state(backend):
    inputs = cast(Case().inputs(), torch.float32)
    with seqmodels.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = linear_attention(*inputs[:4], initial_state=inputs[6])
        y_t = linear_attention_step(*(x[:, 0] for x in inputs[:4]), inputs[6].clone())
    assert y.dtype == y_t.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    with seqmodels.backend(backend):
        wanted, wanted_state = linear_attention(*(x.bfloat16() for x in inputs[:3]), inputs[3], initial_state=inputs[6])
    assert torch.equal(y, wanted)
    assert torch.equal(state, wanted_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_given_is_changed(backend):
    inputs = cast(Case().inputs(), torch.float32)
    copies = [x.clone() for x in inputs]
    with seqmodels.backend(backend):
        _, state = linear_attention(
            *inputs[:4], past_weight=inputs[4], diagonal_weight=inputs[5], initial_state=inputs[6]
        )
        state.zero_()
    for given, copy in zip(inputs, copies, strict=True):
        assert torch.equal(given, copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    q, k, v = torch.randn(3, 2, 2, 9, 5).transpose(2, 3).unbind(0)  # (batch, length, heads, width), not contiguous
    log_decay = -torch.rand(2, 2, 9).transpose(1, 2)
    with seqmodels.backend(backend):
        found = linear_attention(q, k, v, log_decay)
        wanted = linear_attention(q.contiguous(), k.contiguous(), v.contiguous(), log_decay.contiguous())
    torch.testing.assert_close(found, wanted)


def shapes(**changes):
    given = dict(q=(2, 6, 2, 4), k=(2, 6, 2, 4), v=(2, 6, 2, 3)) | changes
    return {name: torch.randn(shape) for name, shape in given.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (shapes(k=(2, 6, 2, 5)), "equal key width"),
        (shapes(v=(2, 7, 2, 3)), "equal batch, length"),
        (shapes(k=(2, 6, 3, 4), v=(2, 6, 4, 3)), "do not divide the 4 heads"),
        (shapes(q=(2, 6, 1, 2, 4)), "rank axis is there for all"),
        (shapes(q=(2, 0, 2, 4), k=(2, 0, 2, 4), v=(2, 0, 2, 3)), "length 0"),
        (shapes(q=(2, 6, 2, 0), k=(2, 6, 2, 0)), "ranks and widths of at least 1"),
        (shapes(v=(2, 6, 2, 0)), "ranks and widths of at least 1"),
        (shapes(q=(2, 6, 0, 2, 4), k=(2, 6, 0, 2, 4), v=(2, 6, 0, 2, 3)), "ranks and widths of at least 1"),
        (shapes(log_decay=(2, 6)), r"log_decay has shape \(2, 6\); expected \(2, 6, 2\)"),
        (shapes(past_weight=(2, 6, 1)), "past_weight has shape"),
        (shapes(initial_state=(2, 2, 4, 4)), r"expected \(2, 2, 4, 3\) torch.float32"),
        ({**shapes(), "chunk_size": 0}, "chunk_size is 0"),
        ({**shapes(), "layout": PACKED}, "layout is for a grid"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments)


def test_bad_dtypes():
    given = shapes()
    with pytest.raises(TypeError, match="one floating-point dtype"):
        linear_attention(given["q"], given["k"].double(), given["v"])
    with pytest.raises(TypeError, match="one floating-point dtype"):
        linear_attention(*(x.long() for x in given.values()))
    with pytest.raises(ValueError, match=r"expected .* torch\.float32"):
        linear_attention(**given, initial_state=torch.zeros(2, 2, 4, 3, dtype=torch.float64))


def test_step_refuses_a_state_it_cannot_update():
    token = [x[:, 0] for x in shapes().values()]
    with pytest.raises(ValueError, match="not contiguous"):
        linear_attention_step(*token, None, torch.zeros(2, 2, 3, 4).transpose(2, 3))
    with pytest.raises(ValueError, match=r"expected \(2, 2, 4, 3\)"):
        linear_attention_step(*token, None, torch.zeros(1, 2, 4, 3))
    q, k, v = token
    with pytest.raises(ValueError, match="ranks and widths of at least 1"):  # the C++ step divides by the state's size
        linear_attention_step(q, k, v[..., :0], None, torch.zeros(2, 2, 4, 0))
