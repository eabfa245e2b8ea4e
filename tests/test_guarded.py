"""Guarded memory finds what it is for, tried on the CPU with functions that stray on purpose."""

from __future__ import annotations

import ctypes

import pytest
import torch

import seqmodels.ops.linear_attention
import seqmodels.ops.short_conv  # noqa: F401  (registers the ops)
from seqmodels.ops import canary
from seqmodels.ops.examples import EXAMPLES, Draw
from seqmodels.ops.registration import OPERATORS
from seqmodels.testing.guarded import GuardedMemory, run_guarded


def poke(tensor, index, value):
    """Writes one float ``index`` elements from the tensor's start, wherever that is."""
    (ctypes.c_float * 1).from_address(tensor.data_ptr() + 4 * index)[0] = value


def peek(tensor, index):
    return (ctypes.c_float * 1).from_address(tensor.data_ptr() + 4 * index)[0]


@pytest.mark.parametrize(("index", "where"), [(-1, "before"), (-1024, "before"), (12, "behind"), (1000, "behind")])
def test_write_out_of_bounds_is_found(index, where):
    def stray(x):
        y = torch.empty_like(x)
        y.copy_(x)
        poke(y, index, 1.0)
        return y

    with pytest.raises(AssertionError, match=f"written out of bounds: .* {where} a tensor made by empty_like of shape"):
        run_guarded(stray, torch.ones(3, 4))
    with pytest.raises(AssertionError, match="an argument of shape"):
        run_guarded(lambda x: poke(x, index, 1.0), torch.ones(3, 4))


@pytest.mark.parametrize("index", [-1, 12])
def test_read_out_of_bounds_is_found(index):
    with pytest.raises(AssertionError, match="read out of bounds"):
        run_guarded(lambda x: x + peek(x, index), torch.ones(3, 4))


def test_unwritten_output_is_found():
    with pytest.raises(AssertionError, match="not finite"):
        run_guarded(lambda x: x.new_empty(5), torch.ones(3))


def test_values_strides_and_results_are_those_of_plain_memory():
    x = torch.randn(4, 6).t()[1:]
    memory = GuardedMemory()
    (copied,) = memory.copy((x,))
    assert torch.equal(copied, x)
    assert copied.stride() == x.stride()
    total, zeros = run_guarded(lambda x: (x.sum(0), torch.zeros(3, dtype=torch.int64)), x)
    torch.testing.assert_close(total, x.sum(0))
    assert torch.equal(zeros, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["linear_attention", "short_conv", "short_conv_step"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_implementations_on_the_cpu_stay_inside_their_memory(name, backend):
    operator = OPERATORS[name]
    for arguments in EXAMPLES[name](Draw(torch.float32, "cpu", length=37)):
        reason = operator._refusal(backend, "cpu", arguments)
        if reason is not None:
            pytest.skip(reason)
        plain = canary.results(operator, backend, arguments)
        guarded = run_guarded(lambda *given, op=operator: canary.results(op, backend, given), *arguments)
        for (what, value), (_, same) in zip(plain, guarded, strict=True):
            torch.testing.assert_close(same, value, msg=lambda text, what=what: f"{what}: {text}")
