"""The canary: what it accepts and refuses, tried on the CPU with implementations that are wrong on purpose."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

import seqmodels.ops.diagonal_ssm
import seqmodels.ops.feature_attention
import seqmodels.ops.linear_attention
import seqmodels.ops.linear_recurrence
import seqmodels.ops.mamba3
import seqmodels.ops.short_conv
import seqmodels.ops.sparse_attention
import seqmodels.ops.vandermonde  # noqa: F401  (registers the ops)
from seqmodels import backends
from seqmodels.ops import canary
from seqmodels.ops.examples import EXAMPLES, Draw
from seqmodels.ops.registration import OPERATORS

CPU = torch.device("cpu")
NAMES = sorted(EXAMPLES)


@pytest.fixture
def gpu(monkeypatch):
    """An unknown GPU, as far as the canary can tell."""
    monkeypatch.setattr(canary, "_verdicts", {})
    monkeypatch.setattr(canary, "device_properties", lambda index: SimpleNamespace(target="sm_120"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correct_implementation_is_well_inside_the_tolerance(name, dtype):
    for arguments in EXAMPLES[name](Draw(dtype, CPU)):
        errors = canary.relative_errors(OPERATORS[name], "torch", arguments)
        assert errors
        assert max(errors.values()) < canary.TOLERANCE[dtype] / 3, errors


@pytest.mark.parametrize("name", NAMES)
def test_wrong_kernel_is_refused_by_name(name, gpu, monkeypatch):
    operator, right = OPERATORS[name], OPERATORS[name].module("torch")

    def last_output_doubled(*args):
        outputs = right.forward(*args)
        return outputs * 2 if isinstance(outputs, torch.Tensor) else (outputs[0] * 2, *outputs[1:])

    wrong = SimpleNamespace(forward=last_output_doubled)
    if hasattr(right, "backward"):
        wrong.backward = right.backward
    monkeypatch.setitem(operator._loaded, "torch", wrong)
    reason = canary.refusal(operator, "torch", CPU)
    assert reason.startswith(
        f"{name} kernel of backend 'torch' on sm_120, torch.float32, example 0: output 0 is off by"
    )
    assert canary.refusal(operator, "torch", CPU) is reason, "asked once a process"


def test_wrong_gradient_is_refused(gpu, monkeypatch):
    operator, right = OPERATORS["short_conv"], OPERATORS["short_conv"].module("torch")

    def backward(*values):
        gradients = list(operator._differentiate(right.forward, values[:2], values[2:]))
        gradients[1] = torch.zeros_like(gradients[1])
        return gradients

    monkeypatch.setitem(operator._loaded, "torch", SimpleNamespace(forward=right.forward, backward=backward))
    assert "gradient to argument 1 is off by" in canary.refusal(operator, "torch", CPU)


def test_crash_is_a_refusal_too(gpu, monkeypatch):
    def crash(*args):
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(OPERATORS["short_conv"]._loaded, "torch", SimpleNamespace(forward=crash))
    reason = canary.refusal(OPERATORS["short_conv"], "torch", CPU)
    assert "raised RuntimeError: illegal memory access" in reason
    assert "seqmodels.backend('torch')" in reason


def test_right_kernel_passes_once_and_leaves_the_generator_alone(gpu, caplog):
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="seqmodels"):
        assert canary.refusal(OPERATORS["short_conv"], "torch", CPU) is None
        assert canary.refusal(OPERATORS["short_conv"], "torch", CPU) is None
    assert sum("agree with the definition on sm_120" in record.message for record in caplog.records) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_never_under_graph_capture_and_not_on_checked_architectures(gpu, monkeypatch):
    monkeypatch.setattr(canary, "verdict", lambda *args: pytest.fail("the canary ran"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert canary.refusal(OPERATORS["short_conv"], "torch", CPU) is None
    assert canary._verdicts == {}, "a capture proves nothing: the next use outside one is checked"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(canary, "CHECKED", frozenset({"sm_120"}))
    assert canary.refusal(OPERATORS["short_conv"], "torch", CPU) is None


def test_arguments_that_a_kernel_does_not_take_are_passed_over(gpu, monkeypatch):
    module = SimpleNamespace(forward=lambda *args: pytest.fail("ran"), supports=lambda *args: "too wide")
    monkeypatch.setitem(OPERATORS["short_conv"]._loaded, "torch", module)
    assert canary.refusal(OPERATORS["short_conv"], "torch", CPU) is None


def test_every_op_with_kernels_has_examples():
    from seqmodels.audit.discovery import kernel_modules

    with_kernels = {
        name
        for name, operator in OPERATORS.items()
        if any(path in kernel_modules() for path in operator.modules.values())
    }
    assert with_kernels
    assert with_kernels <= set(EXAMPLES)


def test_backends_in_place_updates_are_seen():
    assert canary.written_arguments(OPERATORS["short_conv_step"]) == [3]
    assert canary.written_arguments(OPERATORS["short_conv"]) == []
    assert backends.requested_backend() == "auto"
